"""The conformance suite of transports. A plug-in's tests subclass it:

```python
class TestMine(TransportSuite):
    factory = "my_package:factory"
    options = {"depth": 4}
```

Every member is a process of its own, but for eight peers at once, which are threads unless `shared_process = False`
(`in_process = True`: all are threads). Destination memory is poisoned, every case has two or more buckets or segments
where that could matter, and no wait is without a deadline. Needs pytest.
"""

from __future__ import annotations

import contextlib

import pytest

from weft.testing.crew import (
    KEY,
    Crew,
    check,
    connect_members,
    differences,
    mirrored,
    move,
    open_members,
    prepare_buckets,
    scattered,
    segments,
    shapes,
)
from weft.testing.extremes import ExtremeSuite
from weft.testing.puppet import EPOCH, POISON, PuppetError


class TransportSuite(ExtremeSuite):
    """What every transport must do, what `ExtremeSuite` and `LossSuite` ask included."""

    @pytest.mark.trap(28, 33, 41)
    @pytest.mark.parametrize("name", sorted(shapes()))
    def test_every_byte_of_every_shape_arrives_and_no_other_byte_changes(self, crew: Crew, name: str) -> None:
        sizes, remote_sizes, buckets = shapes()[name]
        open_members(crew, {"a": sizes, "b": remote_sizes})
        prepare_buckets(crew, {("a", "b"): buckets})
        crew["a"].call("fill", 7)
        move(crew, "a", "b", range(len(buckets)), 1)
        check(crew, "a", "b", buckets, len(sizes), len(remote_sizes))

    @pytest.mark.trap(34, 44)
    def test_a_bucket_is_announced_only_when_all_its_bytes_are_in_place(self, crew: Crew) -> None:
        rows, size = scattered(20_000, 300, 3)
        open_members(crew, {"a": [size], "b": [size]})
        prepare_buckets(crew, {("a", "b"): [rows, rows[:0]]})
        for version in range(3):
            crew["a"].call("fill", version)
            crew["b"].call("poison")
            crew["b"].begin("collect_and_read", KEY, 0, version, 0, crew.seconds)
            crew["a"].call("post", KEY, 0, version, b"", False)
            crew["a"].call("posted", 0, "b", crew.seconds)
            seen = crew["b"].end()
            missing = differences([crew["a"].call("contents", 0)], seen, [rows], 0)
            assert not missing, f"announced before all bytes were in place: {missing}"

    @pytest.mark.trap(35)
    def test_notes_and_tags_are_delivered_exactly_as_sent(self, crew: Crew) -> None:
        open_members(crew, {"a": [100], "b": [100]}, incarnation=5)
        prepare_buckets(crew, {("a", "b"): [segments([(0, 0, 0, 0, 10)]), segments([(0, 10, 0, 10, 10)])]})
        longest = bytes(range(256)) * 16
        for bucket, version, note in ((0, 1, b""), (1, 1 << 40, longest), (0, 2, b"\x00\xff")):
            crew["a"].call("post", KEY, bucket, version, note, False)
            crew["a"].call("posted", bucket, "b", crew.seconds)
            assert crew["b"].call("collect", 1, crew.seconds) == [["a", [version, "a", 5, EPOCH], bucket, note]]
            crew["b"].call("fence", KEY, bucket, version)
        with pytest.raises(PuppetError, match=r"ConfigError.*4097 bytes"):
            crew["a"].call("post", KEY, 0, 3, longest + b"x", False)
        with pytest.raises(PuppetError, match=r"ConfigError.*65537 bytes"):
            crew["a"].call("signal", "b", 3, bytes(65537))

    @pytest.mark.trap(35)
    def test_every_message_is_delivered_once(self, crew: Crew) -> None:
        open_members(crew, {"a": [100], "b": [100]})
        prepare_buckets(crew, {("a", "b"): [segments([(0, 0, 0, 0, 10)]), segments([(0, 10, 0, 10, 10)])]})
        for version in range(1, 4):
            crew["a"].call("signal", "b", version, b"signal")
            for bucket in (0, 1):
                crew["a"].call("post", KEY, bucket, version, b"bucket", False)
                crew["a"].call("posted", bucket, "b", crew.seconds)
        crew["a"].call("signal", "b", 4, b"last")
        got: list[tuple[int, int | None]] = []
        while not got or got[-1][0] != 4:
            got += [(tag[0], bucket) for _, tag, bucket, _ in crew["b"].call("collect", 1, crew.seconds)]
        counts = {message: got.count(message) for message in got}
        assert set(counts) == {(version, bucket) for version in (1, 2, 3) for bucket in (None, 0, 1)} | {(4, None)}
        again = [message for message, count in counts.items() if count > 1]
        assert not again, f"delivered more than once (version, bucket): {again}"

    def test_both_directions_at_once(self, crew: Crew) -> None:
        size = 6 << 20
        there, back = segments([(0, 0, 1, 0, size)]), segments([(0, 0, 1, 0, size - 5), (0, size - 5, 1, size - 5, 5)])
        open_members(crew, {"a": [size, size], "b": [size, size]})
        prepare_buckets(crew, {("a", "b"): [there, there[:0]], ("b", "a"): [back, back[:0]]})
        for name, seed in (("a", 1), ("b", 2)):
            crew[name].call("fill", seed)
        for version in range(1, 4):
            for name in "ab":
                crew[name].call("post", KEY, 0 if name == "a" else 2, version, b"", False)
            for name, peer in (("a", "b"), ("b", "a")):
                crew[name].begin("posted", 0 if name == "a" else 2, peer, crew.seconds)
            for name in "ab":
                crew[name].end()
            for name in "ab":
                assert crew[name].call("collect", 1, crew.seconds)[0][1][0] == version
        assert crew["a"].call("contents", 0) == crew["b"].call("contents", 1)
        assert crew["b"].call("contents", 0) == crew["a"].call("contents", 1)

    @pytest.mark.trap(36, 39)
    def test_many_buckets_may_be_posted_at_once(self, crew: Crew) -> None:
        count, nbytes = 200, 10_000
        buckets = [segments([(0, i * nbytes, 0, (count - 1 - i) * nbytes, nbytes)]) for i in range(count)]
        open_members(crew, {"a": [count * nbytes], "b": [count * nbytes]})
        prepare_buckets(crew, {("a", "b"): buckets})
        crew["a"].call("fill", 3)
        move(crew, "a", "b", range(count), 9)
        check(crew, "a", "b", buckets, 1, 1)

    def test_signals_arrive_in_order_and_after_what_was_finished_before(self, crew: Crew) -> None:
        open_members(crew, {"a": [2 << 20], "b": [2 << 20]})
        buckets = [segments([(0, 0, 0, 0, 1 << 20)]), segments([(0, 1 << 20, 0, 1 << 20, 77)])]
        prepare_buckets(crew, {("a", "b"): buckets})
        sizes = [0, 65536, 1, 9000, 300, 65536, 4096]
        for version in range(5):
            for bucket in (0, 1):
                crew["a"].call("post", KEY, bucket, version, b"", False)
                crew["a"].call("posted", bucket, "b", crew.seconds)
                for i, nbytes in enumerate(sizes):
                    crew["a"].call("signal", "b", version, bytes([i]) * nbytes)
        got = crew["b"].call("collect", 10 * (1 + len(sizes)), crew.seconds)
        expected = [
            (version, bucket, note)
            for version in range(5)
            for at in (0, 1)
            for bucket, note in [(at, b""), *((None, bytes([i]) * nbytes) for i, nbytes in enumerate(sizes))]
        ]
        assert [(tag[0], bucket, note) for _, tag, bucket, note in got] == expected, "messages overtook one another"

    def test_what_a_peer_sends_before_this_side_connects_is_delivered(self, crew: Crew) -> None:
        a, b = open_members(crew, {"a": [10], "b": [10]}, connect=False).values()
        crew["a"].call("connect", *b[:2], crew.seconds)
        crew["a"].call("signal", "b", 4, b"early")
        crew["b"].call("connect", *a[:2], crew.seconds)
        assert crew["b"].call("collect", 1, crew.seconds) == [["a", [4, "a", 0, EPOCH], None, b"early"]]

    def test_members_connect_in_any_order(self, crew: Crew) -> None:
        records = open_members(crew, {"a": [90], "b": [90], "c": [90]}, connect=False)
        for name, order in (("a", ("b", "c")), ("b", ("c", "a")), ("c", ("a", "b"))):
            for peer in order:
                crew[name].call("connect", *records[peer][:2], crew.seconds)
        ring = (("a", "b"), ("b", "c"), ("c", "a"))
        prepare_buckets(crew, {pair: [segments([(0, 0, 0, 30, 30)]), segments([(0, 5, 0, 60, 1)])] for pair in ring})
        for name in "abc":
            crew[name].call("fill", ord(name))
        for index, (name, peer) in enumerate(ring):
            expected = crew[name].call("contents", 0)[:30]
            move(crew, name, peer, [2 * index, 2 * index + 1], 1)
            assert crew[peer].call("contents", 0)[30:60] == expected

    @pytest.mark.trap(37)
    def test_a_post_waits_for_its_event_without_blocking(self, crew: Crew) -> None:
        buckets = [segments([(0, 0, 0, 0, 10)]), segments([(0, 10, 0, 10, 10)])]
        open_members(crew, {"a": [20], "b": [20]})
        prepare_buckets(crew, {("a", "b"): buckets})
        crew["a"].call("post", KEY, 0, 1, b"gated", True)
        crew["a"].call("post", KEY, 1, 1, b"ungated", False)
        crew["a"].call("posted", 1, "b", crew.seconds)
        early = [message[3] for message in crew["b"].call("collect", 1, crew.seconds)]
        assert early == [b"ungated"], "a bucket left before its event"
        assert crew["b"].call("contents", 0)[:10] == bytes([POISON]) * 10
        crew["a"].call("fill", 1)
        crew["a"].call("open_gate")
        crew["a"].call("posted", 0, "b", crew.seconds)
        assert crew["b"].call("collect", 1, crew.seconds)[0][2:] == [0, b"gated"]
        assert crew["b"].call("contents", 0)[:10] == crew["a"].call("contents", 0)[:10]

    def test_a_cancelled_post_may_be_posted_again(self, crew: Crew) -> None:
        buckets = [segments([(0, 0, 0, 0, 10)]), segments([(0, 10, 0, 10, 10)])]
        open_members(crew, {"a": [20], "b": [20]})
        prepare_buckets(crew, {("a", "b"): buckets})
        crew["a"].call("post", KEY, 0, 1, b"given up", True)
        crew["a"].call("cancel", 0)
        crew["a"].call("open_gate")
        crew["a"].call("fill", 4)
        move(crew, "a", "b", [0, 1], 2)
        check(crew, "a", "b", buckets, 1, 1)

    def test_wrong_use_is_an_error_that_says_what_is_wrong(self, crew: Crew) -> None:
        open_members(crew, {"a": [100], "b": [50]})
        with pytest.raises(PuppetError, match=r"ConfigError(.|\n)*0:60 outside region 0 of 50 bytes"):
            prepare_buckets(crew, {("a", "b"): [segments([(0, 0, 0, 0, 60)])]})
        with pytest.raises(PuppetError, match=r"ConfigError(.|\n)*local(.|\n)*region 3(.|\n)*remote(.|\n)*region 2"):
            prepare_buckets(crew, {("a", "b"): [segments([(3, 0, 0, 0, 6), (0, 0, 2, 0, 6)])]})
        prepare_buckets(crew, {("a", "b"): [segments([(0, 0, 0, 0, 50)]), segments([])]})
        with pytest.raises(PuppetError, match=r"ConfigError.*bucket 17"):
            crew["a"].call("post", KEY, 17, 1, b"", False)
        crew["a"].call("post", KEY, 0, 1, b"", True)
        with pytest.raises(PuppetError, match=r"TransportError.*bucket 0.*active"):
            crew["a"].call("post", KEY, 0, 2, b"", False)
        with pytest.raises(PuppetError, match=r"ConfigError.*no option misspelled"):
            crew["a"].call("make", {"misspelled": 1})
        with pytest.raises(PuppetError) as caught:
            crew["a"].call("signal", "stranger", 1, b"")
        assert caught.value.kind == "PeerLostError"
        assert caught.value.peer == "stranger"

    @pytest.mark.trap(31)
    def test_memory_is_registered_once_and_whole(self, crew: Crew) -> None:
        open_members(crew, {"a": [1000], "b": [1000]})
        with pytest.raises(PuppetError, match=r"ConfigError.*overlaps.*region0"):
            crew["a"].call("register_part", 0, 900, 1000, 1)
        with pytest.raises(PuppetError, match=r"ConfigError.*dense"):
            crew["a"].call("register_part", 0, 0, 1000, 2)
        crew["a"].call("deregister", 0)
        with pytest.raises(PuppetError, match=r"ConfigError.*not registered"):
            prepare_buckets(crew, {("a", "b"): [segments([(0, 0, 0, 0, 50)])]})
        crew["a"].call("register_again", 0)
        crew["a"].call("fill", 1)
        connect_members(crew, "ab")
        prepare_buckets(crew, {("a", "b"): [segments([(0, 0, 0, 0, 50)]), segments([(0, 60, 0, 60, 40)])]})
        move(crew, "a", "b", [0, 1], 1)

    def test_regions_registered_later_are_reached_after_connecting_again(self, crew: Crew) -> None:
        first, second = segments([(0, 0, 0, 0, 50)]), segments([(1, 0, 1, 0, 900_000), (0, 3, 0, 60, 4)])
        open_members(crew, {"a": [1000], "b": [1000]})
        prepare_buckets(crew, {("a", "b"): [first], ("b", "a"): [first]})
        move(crew, "a", "b", [0], 1)
        for name in "ab":
            crew[name].call("release", KEY)
            crew[name].call("register", 900_000)
        connect_members(crew, "ab")
        prepare_buckets(crew, {("a", "b"): [second, first], ("b", "a"): [mirrored(second)]}, b"after registering")
        crew["a"].call("fill", 1)
        move(crew, "a", "b", [0, 1], 2, b"after registering")
        assert crew["b"].call("contents", 1) == crew["a"].call("contents", 1)
        move(crew, "b", "a", [2], 3, b"after registering")

    def test_nothing_of_a_forgotten_peer_is_delivered(self, crew: Crew) -> None:
        records = open_members(crew, {"a": [10], "b": [10], "c": [10]})
        crew["b"].call("disconnect", "a")
        with contextlib.suppress(PuppetError):  # some transports let the sender know, some do not
            crew["a"].call("signal", "b", 1, b"late")
        crew["c"].call("signal", "b", 1, b"other")
        assert [m[0] for m in crew["b"].call("collect", 1, crew.seconds)] == ["c"]
        with pytest.raises(PuppetError, match=r"DeadlineError"):
            crew["b"].call("collect", 1, 0.3)
        with pytest.raises(PuppetError, match=r"PeerLostError"):
            crew["b"].call("signal", "a", 1, b"")
        assert set(records) == set("abc")

    @pytest.mark.trap(48)
    def test_what_was_signalled_before_close_arrives(self, crew: Crew) -> None:
        open_members(crew, {"a": [10], "b": [10]})
        notes = [bytes([i]) * 30_000 for i in range(100)]
        for note in notes:
            crew["a"].call("signal", "b", 1, note)
        crew["a"].call("close")
        assert [message[3] for message in crew["b"].call("collect", len(notes), crew.seconds)] == notes

    def test_close_ends_everything_and_use_afterwards_is_an_error(self, crew: Crew) -> None:
        records = open_members(crew, {"a": [10], "b": [10]})
        prepare_buckets(crew, {("a", "b"): [segments([(0, 0, 0, 0, 5)]), segments([])]})
        crew["a"].call("close")
        for command in (
            ("post", KEY, 0, 1, b"", False),
            ("signal", "b", 1, b""),
            ("collect", 1, crew.short_seconds),
            ("connect", *records["b"][:2], crew.short_seconds),
            ("register", 10),
            ("record",),
        ):
            with pytest.raises(PuppetError, match=r"TransportError.*closed"):
                crew["a"].call(*command)
