"""What warm refits ask of the store grows with replicas and not with members: counted outside of all members."""

from __future__ import annotations

import threading

import pytest

import weft.loop
import weft.refit
import weft.rendezvous
from weft.contracts import StoreLease
from weft.deadline import Deadline, Deadlines
from weft.refit import Refit
from weft.roster import Event, Expect, Roster
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
        self._values: dict[str, bytes] = {}
        self._counters: dict[str, int] = {}
        self.operations = 0

    def set(self, key: str, value: bytes) -> None:
        with self._lock:
            self.operations += 1
            self._values[key] = value

    def get(self, key: str) -> bytes | None:
        with self._lock:
            self.operations += 1
            return self._values.get(key)

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
        raise NotImplementedError

    def close(self) -> None:
        pass


class OneRoster(Roster):
    """What all members conclude from their log, concluded once: in one process it takes hundreds of them minutes."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._applied: set[tuple[str, str, int]] = set()

    def apply(self, event: Event) -> None:
        with self._lock:
            known = (event.action, event.name, event.incarnation)
            if known not in self._applied:
                self._applied.add(known)
                super().apply(event)


def operations_of_a_warm_refit(monkeypatch: pytest.MonkeyPatch, replicas: int, members: int) -> float:
    """Of a source, and of `replicas` times `members` targets, all in this process."""
    store, roster = Memory(), OneRoster()
    monkeypatch.setattr(weft.refit, "open_store", lambda url, deadline: store)
    monkeypatch.setattr(weft.rendezvous, "Roster", lambda: roster)
    counts: list[int] = []
    everybody = threading.Barrier(1 + replicas * members, lambda: counts.append(store.operations))
    tiny = Tiny(layers=1, hidden=2, inner=members)

    def train(refit: Refit) -> None:
        for version in range(1, VERSIONS + 1):
            refit.offer(version).committed()
            everybody.wait(SECONDS)

    def serve(refit: Refit) -> None:
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
    monkeypatch.setattr(weft.rendezvous, "_LONGEST_SLEEP_SECONDS", 0.5)
    used = {
        (replicas, members): operations_of_a_warm_refit(monkeypatch, replicas, members)
        for replicas, members in ((4, 5), (8, 5), (8, 25))
    }
    assert used[8, 25] == used[8, 5], f"more members use the store more often: {used}"
    assert used[8, 5] - used[4, 5] == 4 * OF_EACH_REPLICA, f"expected {OF_EACH_REPLICA} more for each replica: {used}"
    assert used[8, 25] <= 8 * OF_EACH_REPLICA + OF_THE_SOURCES
