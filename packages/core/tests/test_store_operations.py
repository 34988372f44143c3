"""What warm refits ask of the store grows with replicas and not with members: counted outside of all members."""

from __future__ import annotations

import threading
from collections import defaultdict

import pytest

import weft.loop
import weft.refit
import weft.rendezvous
from weft.contracts import StoreLease
from weft.deadline import Deadline, Deadlines
from weft.member import Member
from weft.refit import Refit
from weft.rendezvous import Rendezvous
from weft.roster import Expect
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny

SECONDS = 240.0
PATIENT = Deadlines(**dict.fromkeys(("rendezvous", "offer", "begin", "move", "vote", "commit"), SECONDS))
VERSIONS = 3
OF_EACH_REPLICA, OF_THE_SOURCES = 2, 2
"""Operations in a warm refit: its leader writes one record, and deletes one of long ago."""


class Memory:
    """A store in this process, which all members share, and which counts what they ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: defaultdict[str, threading.Condition] = defaultdict(lambda: threading.Condition(self._lock))
        self._values: dict[str, bytes] = {}
        self._counters: dict[str, int] = {}
        self.operations = self.bytes_read = 0

    def set(self, key: str, value: bytes) -> None:
        with self._lock:
            self.operations += 1
            self._values[key] = value
            self._changed[key].notify_all()

    def get(self, key: str) -> bytes | None:
        with self._lock:
            self.operations += 1
            return self._read(key)

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            self.operations += 1
            self._counters[key] = self._counters.get(key, 0) + amount
            return self._counters[key]

    def delete(self, key: str) -> None:
        with self._lock:
            self.operations += 1
            self._values.pop(key, None)

    def keys(self, prefix: str) -> list[str]:
        raise NotImplementedError

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        raise NotImplementedError

    def watch(self, key: str, known: bytes | None, deadline: Deadline) -> bytes | None:
        with self._lock:
            self.operations += 1
            self._changed[key].wait_for(lambda: self._values.get(key) != known, deadline.remaining())
            return self._read(key)

    def close(self) -> None:
        pass

    def _read(self, key: str) -> bytes | None:
        value = self._values.get(key)
        self.bytes_read += len(value or b"")
        return value


def operations_of_a_warm_refit(monkeypatch: pytest.MonkeyPatch, replicas: int, members: int) -> float:
    """Of a source, and of `replicas` times `members` targets, all in this process."""
    store = Memory()
    monkeypatch.setattr(weft.refit, "open_store", lambda url, deadline: store)
    counts: list[int] = []
    refits: set[Refit] = set()  # as they count: what leaders show may still be on its way to the store

    def count() -> None:
        counts.append(sum(refit.store_operations for refit in refits))

    everybody = threading.Barrier(1 + replicas * members, count)
    tiny = Tiny(layers=1, hidden=2, inner=members)

    def train(refit: Refit) -> None:
        refits.add(refit)
        for version in range(1, VERSIONS + 1):
            refit.offer(version).committed()
            everybody.wait(SECONDS)

    def serve(refit: Refit) -> None:
        refits.add(refit)
        for version in range(1, VERSIONS + 1):
            refit.receive(version)
            everybody.wait(SECONDS)

    source = MemorySource("trainer/0", tiny.source(0, 1))
    source.load(tiny.tensors(0))
    parts = [Part(source.name, train, source=source)]
    for replica in range(replicas):
        for rank in range(members):
            target = MemoryTarget(f"rollout{replica}/{rank}", tiny.target(rank, members))
            parts.append(Part(target.name, serve, target=target, replica=f"rollout{replica}", replica_size=members))
    all_succeeded(Job("memory://", Expect(1, replicas), deadlines=PATIENT).run(parts, SECONDS))
    return (counts[-1] - counts[0]) / (VERSIONS - 1)


@pytest.mark.trap(75)
def test_warm_refits_use_the_store_as_often_as_there_are_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    # Hundreds of threads take turns: those that wait leave the turn to others.
    monkeypatch.setattr(weft.loop, "_LONGEST_SLEEP_SECONDS", 0.05)
    monkeypatch.setattr(weft.rendezvous, "_LONGEST_LOOK_SECONDS", 0.5)
    used = {
        (replicas, members): operations_of_a_warm_refit(monkeypatch, replicas, members)
        for replicas, members in ((4, 5), (8, 5), (8, 25))
    }
    assert used[8, 25] == used[8, 5], f"more members use the store more often: {used}"
    assert used[8, 5] - used[4, 5] == 4 * OF_EACH_REPLICA, f"expected {OF_EACH_REPLICA} more for each replica: {used}"
    assert used[8, 25] <= 8 * OF_EACH_REPLICA + OF_THE_SOURCES


@pytest.mark.trap(75)
@pytest.mark.parametrize("waits", [False, True])
def test_who_joins_reads_what_each_of_five_hundred_members_says_once(waits: bool) -> None:
    store, members = Memory(), 500
    deadline, layout = Deadline.after(SECONDS), Tiny(layers=1, hidden=2, inner=1).source(0, 1)

    def join(name: str) -> Rendezvous:
        rendezvous = Rendezvous(store, "job", Expect(members - 1, 1), deadline)
        source, target = (None, layout.address) if name == "rollout" else (layout.address, None)
        replica = ("rollout", 1) if target else (None, 0)
        made = Member(name, source, target, *replica, "host", "host", "cpu", incarnation=rendezvous.incarnation(name))
        rendezvous.announce(made, {layout.address: layout}, b"\x80", weft_version="0.1.0")
        return rendezvous

    first = join("rollout")
    met: list[int] = []
    waiting = threading.Thread(target=lambda: met.append(len(first.members())), daemon=True)
    if waits:
        before = store.operations
        waiting.start()
    others = [join(f"trainer/{n:03}") for n in range(1, members)]
    joining = store.operations
    if waits:
        waiting.join(SECONDS)
        assert met == [members]
        of_a_join = 5  # its name's counter, its layout, the entries' counter, its entry
        assert store.operations - before <= members + 1 + (members - 1) * of_a_join
        return
    bytes_before = store.bytes_read
    assert len(others[-1].members()) == members
    assert store.operations - joining == members + 1, "one read per entry, and one that finds no more"
    assert store.bytes_read - bytes_before < 300 * members
