"""The conformance suite of stores. A plug-in's tests subclass it and say where a fresh, empty store is:

```python
class TestMine(StoreSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}"
```

Stores are opened by URL, so the scheme must be an installed entry point of group `weft.stores`. Needs pytest.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import pytest

from weft.builder import LayoutBuilder
from weft.contracts import LEASE_BYTES, Store
from weft.deadline import Deadline
from weft.errors import StoreError
from weft.facts import Facts
from weft.formats import Format
from weft.layout import Layout
from weft.member import Member
from weft.rendezvous import Rendezvous
from weft.roster import Expect
from weft.stores import open_store
from weft.testing.suite import Suite, within

WEIRD_KEYS = (
    "",
    " ",
    ".",
    "..",
    "../up",
    "/",
    "//a/",
    "a",
    "a/b",
    "a%2Fb",
    "a.value",
    "a b\n\tc",
    "*?[x]",
    "grün/重み",
    "C:\\con",
    "'\"`$(x)",
    "k" * 1000,
    "ü" * 300 + "/x",
)
"""Keys that quoting, paths or patterns might mistake for something else."""


class StoreSuite(Suite):
    """What every store must do."""

    @pytest.fixture
    def url(self) -> str:
        """Where a fresh, empty store is. Subclasses override it."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        """One client."""
        store = open_store(url, Deadline.after(self.seconds))
        yield store
        store.close()

    @pytest.fixture
    def other(self, url: str) -> Iterator[Store]:
        """Another client of the same store."""
        store = open_store(url, Deadline.after(self.seconds))
        yield store
        store.close()

    @pytest.mark.trap(40)
    def test_a_missing_key_reads_as_none_without_waiting(self, store: Store) -> None:
        assert within(self.seconds, "get of a missing key", partial(store.get, "missing")) is None

    def test_a_write_replaces_what_was_there(self, store: Store) -> None:
        for value in (b"1", b"22", b"", b"1"):
            store.set("a", value)
            assert store.get("a") == value, "a write was lost"

    def test_a_client_reads_what_another_has_written_since(self, store: Store, other: Store) -> None:
        for value in (b"1", b"22", b"", b"1"):
            other.set("a", value)
            assert store.get("a") == value, "an old value was read again"

    def test_what_is_set_is_read_by_every_client(self, store: Store, other: Store) -> None:
        store.set("a", b"1")
        assert store.get("a") == other.get("a") == b"1"
        other.set("a", b"22")
        assert store.get("a") == other.get("a") == b"22"

    @pytest.mark.parametrize("size_bytes", [0, 1, (4 << 20) - 1, 4 << 20, (8 << 20) + 1, 20_000_003])
    def test_values_of_any_size_come_back_unchanged(self, store: Store, other: Store, size_bytes: int) -> None:
        value = (bytes(range(251)) * (size_bytes // 251 + 1))[:size_bytes]
        store.set("value", value)
        assert (other.get("value") == value) is True, f"{size_bytes} bytes came back changed"
        assert store.keys("") == ["value"]

    @pytest.mark.parametrize("value", [b"?", b"w", b"p", b"p0/1", b"\x00\xff\n", b"0"])
    def test_values_that_resemble_a_stores_own_marks_come_back_unchanged(self, store: Store, value: bytes) -> None:
        store.set("value", value)
        assert store.get("value") == value

    def test_what_is_said_of_tensors_and_members_is_kept(self, store: Store, other: Store) -> None:
        layout, facts = described_layout(), Facts("1", "3", torch="2.13.0+cpu", frameworks={"grün/重み": "1\n2"})
        sides = [Rendezvous(each, "job", Expect(1, 1), Deadline.after(self.seconds)) for each in (store, other)]
        members = [
            Member("source", layout.address, None, None, 0, "h", "d", "cpu", (), sides[0].incarnation("source")),
            Member("target", None, layout.address, "r", 1, "h", "d", "cpu", (), sides[1].incarnation("target")),
        ]
        for side, member in zip(sides, members, strict=True):
            side.announce(member, {layout.address: layout}, b"", facts if member.is_source else None)
        for side in sides:
            found = side.layout(layout.address)
            assert (found.formats, found.extra) == (layout.formats, layout.extra), "what is said of tensors has changed"
            assert side.facts() == {"source": facts, "target": Facts()}, "what members run on has changed"

    def test_large_and_small_values_replace_each_other(self, store: Store) -> None:
        for value in (b"a" * 9_000_000, b"small", b"b" * 5_000_000, b"c" * 10_000_000, b""):
            store.set("value", value)
            assert store.get("value") == value
        assert store.keys("") == ["value"]

    def test_readers_see_whole_values_while_they_are_replaced(self, store: Store, other: Store) -> None:
        values = [bytes([n]) * 5_000_000 for n in range(3)]
        store.set("value", values[0])

        def write() -> None:
            for _ in range(4):
                for value in values:
                    other.set("value", value)

        writer, deadline = threading.Thread(target=write, daemon=True), Deadline.after(self.seconds)
        writer.start()
        while writer.is_alive():
            assert not deadline.expired(), "setting a value waits without a deadline"
            assert (store.get("value") in values) is True, "a value was read while it was half replaced"

    def test_keys_of_any_characters_are_kept_apart(self, store: Store, other: Store) -> None:
        for index, key in enumerate(WEIRD_KEYS):
            store.set(key, b"%d" % index)
            assert store.add(key + "#", index + 1) == index + 1
        assert [other.get(key) for key in WEIRD_KEYS] == [b"%d" % index for index in range(len(WEIRD_KEYS))]
        assert other.keys("") == sorted([*WEIRD_KEYS, *(key + "#" for key in WEIRD_KEYS)])
        for key in WEIRD_KEYS:
            other.delete(key)
            other.delete(key + "#")
        assert store.keys("") == []

    def test_keys_are_listed_by_prefix_and_sorted(self, store: Store) -> None:
        for key in ("job/b", "job/a/2", "job/a/10", "jobs", "other"):
            store.set(key, b"x" * 5_000_000 if key == "job/b" else b"x")
        store.add("job/counter", 1)
        job = ["job/a/10", "job/a/2", "job/b", "job/counter"]
        for prefix, listed in (
            ("job/", job), ("job", [*job, "jobs"]), ("job/a", job[:2]), ("job/a/1", job[:1]), ("nothing", []),
        ):  # fmt: skip
            found = store.keys(prefix)
            assert found == listed, f"keys({prefix!r}) lists {found}, expected {listed}"

    def test_delete_removes_values_and_counters_and_forgives_missing_keys(self, store: Store, other: Store) -> None:
        store.set("small", b"1")
        store.set("large", b"1" * 9_000_000)
        store.add("counter", 5)
        for key in ("small", "large", "counter", "missing"):
            other.delete(key)
        for key in ("small", "large"):
            assert within(self.seconds, "get of a deleted key", partial(store.get, key)) is None
        assert store.keys("") == []
        assert store.add("counter", 1) == 1

    def test_counters_start_at_zero_and_add_both_ways(self, store: Store, other: Store) -> None:
        assert store.add("counter", 0) == 0
        assert store.add("counter", 12345678901) == 12345678901
        assert other.add("counter", -12345678903) == -2
        assert store.add("counter", 1) == -1

    def test_threads_may_share_a_client(self, store: Store) -> None:
        def work(thread: int) -> list[int]:
            sums = []
            for step in range(50):
                sums.append(store.add("counter", 1))
                store.set(f"{thread}/{step}", b"%d" % step)
                assert store.get(f"{thread}/{step}") == b"%d" % step
            return sums

        with ThreadPoolExecutor(4) as pool:
            sums = [total for result in pool.map(work, range(4)) for total in result]
        assert sorted(sums) == list(range(1, 201)), "threads got equal sums: adding is not atomic"

    def test_processes_adding_at_once_get_different_sums(self, url: str, store: Store) -> None:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = [pool.submit(add_many, url, 2, 1000, self.seconds) for _ in range(2)]
            sums = [total for result in results for total in result.result(3 * self.seconds)]
        assert len(set(sums)) == 2000, f"{2000 - len(set(sums))} of 2000 sums were given twice: adding is not atomic"
        assert sorted(sums) == list(range(1, 2001))
        assert store.add("counter", 0) == 2000

    def test_a_lease_holds_a_value_like_any_other(self, store: Store, other: Store) -> None:
        lease = store.lease("member", b"alive", self.seconds)
        assert (lease.key, lease.seconds) == ("member", self.seconds)
        assert other.get("member") == b"alive"
        assert other.keys("") == ["member"]
        lease.renew()
        lease.release()
        lease.release()
        assert other.get("member") is None
        assert other.keys("") == []
        with pytest.raises(StoreError, match=r"member.*released"):
            lease.renew()

    def test_a_lease_that_is_not_renewed_vanishes(self, store: Store, other: Store) -> None:
        lease = store.lease("member", b"alive", 0.3)
        deadline = Deadline.after(self.seconds)
        while other.get("member") is not None:
            assert not deadline.expired(), "a lease of 0.3 s is still there"
            time.sleep(0.01)
        assert other.keys("") == []
        with pytest.raises(StoreError, match=r"member.*lost"):
            lease.renew()
        assert other.get("member") is None, "a lost lease came back"

    def test_a_lease_that_is_renewed_stays(self, store: Store, other: Store) -> None:
        for _ in range(5):
            if self._stays(store, other, seconds=1.0):
                return
        pytest.fail("this machine cannot renew a lease of 1 s in time")

    def _stays(self, store: Store, other: Store, seconds: float) -> bool:
        """Renew one of two leases until the other has been gone for a while; False when this came too late once."""
        kept, left = store.lease("kept", b"1", seconds), store.lease("left", b"2", seconds)
        renewed = started = time.monotonic()
        while other.get(left.key) is not None or time.monotonic() < started + 1.5 * seconds:
            before = time.monotonic()
            try:
                kept.renew()
                there = other.get(kept.key) == b"1"
            except StoreError:
                there = False
            if time.monotonic() > renewed + 0.8 * seconds:
                return False
            assert there, "a lease vanished although it was renewed"
            renewed = before
            time.sleep(0.05)
        kept.release()
        return True

    def test_a_lease_that_was_replaced_takes_nothing_with_it(self, store: Store, other: Store) -> None:
        first = store.lease("member", b"first", self.seconds)
        second = other.lease("member", b"second", self.seconds)
        first.release()
        assert store.get("member") == b"second", "another's key was removed"
        second.renew()
        third = store.lease("member", b"third", 0.2)
        other.set("member", b"no lease")
        with pytest.raises(StoreError, match=r"member.*lost"):
            third.renew()
        with pytest.raises(StoreError, match=r"member.*lost"):
            second.renew()
        time.sleep(0.4)
        assert store.get("member") == b"no lease", "the lease's end outlived the lease"

    @pytest.mark.parametrize(("size_bytes", "seconds"), [(0, 0.0), (0, -1.0), (LEASE_BYTES + 1, 1.0)])
    def test_leases_of_no_time_or_too_large_are_refused(self, store: Store, size_bytes: int, seconds: float) -> None:
        with pytest.raises(StoreError, match=f"at most {LEASE_BYTES} bytes for more than 0 s"):
            store.lease("member", b"x" * size_bytes, seconds)

    def test_a_watch_ends_at_once_when_the_value_is_not_the_known_one(self, store: Store) -> None:
        deadline = Deadline.after(10 * self.seconds)
        store.set("version", b"1")
        for known in (None, b"", b"0"):
            assert within(self.seconds, "watch", partial(store.watch, "version", known, deadline)) == b"1"
        assert within(self.seconds, "watch", partial(store.watch, "missing", b"1", deadline)) is None

    @pytest.mark.trap(40)
    def test_a_watch_of_what_does_not_change_ends_at_its_deadline(self, store: Store) -> None:
        store.set("version", b"1")
        store.set("other", b"1")
        for key, known in (("version", b"1"), ("missing", None)):
            deadline = Deadline.after(0.3)
            assert within(self.seconds, "watch", partial(store.watch, key, known, deadline)) == known
            assert deadline.expired(), "a watch ended although nothing had changed"

    def test_a_watch_ends_when_the_value_changes(self, store: Store, other: Store) -> None:
        """The client goes on with other things meanwhile."""
        large = b"2" * 5_000_000
        for known, value in ((None, b"1"), (b"1", large), (large, b"3")):
            with ThreadPoolExecutor(1) as pool:
                watch = pool.submit(store.watch, "version", known, Deadline.after(3 * self.seconds))
                store.set("elsewhere", b"")
                assert store.get("version") == known
                other.set("version", value)
                try:
                    found = watch.result(self.seconds)
                except TimeoutError:
                    raise AssertionError(f"a watch has not ended within {self.seconds} s of a change") from None
                assert (found == value) is True

    def test_a_watch_sees_a_key_vanish(self, store: Store, other: Store) -> None:
        def delete(key: str) -> None:
            other.set(key, b"1")
            with ThreadPoolExecutor(1) as pool:
                watch = pool.submit(store.watch, key, b"1", Deadline.after(self.seconds))
                other.delete(key)
                assert watch.result() is None, "a deleted key was not seen to vanish"

        def expire(key: str) -> None:
            other.lease(key, b"1", 0.3)
            assert store.watch(key, b"1", Deadline.after(self.seconds)) is None, "a lease was not seen to vanish"

        def release(key: str) -> None:
            lease = other.lease(key, b"1", 10 * self.seconds)
            with ThreadPoolExecutor(1) as pool:
                watch = pool.submit(store.watch, key, b"1", Deadline.after(self.seconds))
                lease.release()
                assert watch.result() is None, "a released key was not seen to vanish"

        for end in (delete, expire, release):
            end(end.__name__)

    def test_many_watch_at_once_and_all_see_it(self, store: Store, other: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            watches = [pool.submit(store.watch, "version", None, Deadline.after(self.seconds)) for _ in range(8)]
            other.set("version", b"1")
            assert [watch.result() for watch in watches] == [b"1"] * 8

    def test_closing_ends_a_watch(self, url: str) -> None:
        store = open_store(url, Deadline.after(self.seconds))
        with ThreadPoolExecutor(1) as pool:
            watch = pool.submit(store.watch, "version", None, Deadline.after(3 * self.seconds))
            assert store.get("version") is None
            store.close()
            with pytest.raises(StoreError, match="closed"):
                watch.result(self.seconds)

    def test_a_closed_client_refuses_and_closes_twice(self, url: str) -> None:
        store = open_store(url, Deadline.after(self.seconds))
        store.close()
        store.close()
        calls: list[Callable[[], object]] = [
            lambda: store.set("a", b""),
            lambda: store.get("a"),
            lambda: store.add("c", 1),
            lambda: store.delete("a"),
            lambda: store.keys(""),
            lambda: store.lease("a", b"", 1.0),
            lambda: store.watch("a", None, Deadline.after(self.seconds)),
        ]
        for call in calls:
            with pytest.raises(StoreError, match="closed"):
                call()


def described_layout() -> Layout:
    """Of many tensors with formats of their own and whatever else may be said of them."""
    builder = LayoutBuilder()
    for n in range(1000):
        said = {"note": chr(0x20 + n) * n, "\0\n": "", "grün/重み": str(n)}
        builder.tensor(f"layers.{n}", (2,), "float32", format=Format("packed", {"block": str(n % 3)}), extra=said)
        builder.buffer(f"layers.{n}", "float32", 2, group="all")
        builder.shard(f"layers.{n}", f"layers.{n}")
    return builder.build()


def add_many(url: str, processes: int, times: int, seconds: float) -> list[int]:
    """What each of `times` additions of 1 to `counter` returned, once as many processes as these have come to add."""
    store = open_store(url, Deadline.after(seconds))
    try:
        store.set(f"ready/{os.getpid()}", b"")
        everybody = Deadline.after(seconds)
        everybody.wait(lambda: len(store.keys("ready/")) == processes, "the other processes", list)
        return [store.add("counter", 1) for _ in range(times)]
    finally:
        store.close()
