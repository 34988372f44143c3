"""An orchestrator in a process of its own pauses and resumes two replicas, dies while one is paused, and comes back."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support.fleet import SOURCES
from support.orchestration import ORCHESTRATOR, Orchestrated

from weft.deadline import Deadline
from weft.orchestration import Doing, replica_states
from weft.store_server import serve_store

REPLICAS = ("steady", "struck")


class Reader:
    """Reads an engine all the time."""

    def __init__(self, company: Orchestrated, replica: str) -> None:
        self.versions: list[int | None] = []
        self.wrong: list[str] = []
        self._engine, self._stop = company.engine(replica), threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._stop.wait(0.005):
            found = self._engine.read()
            version, wrong = (None, []) if found is None else found
            self.wrong += wrong
            if version not in self.versions[-1:]:
                self.versions.append(version)

    def end(self) -> list[int]:
        """The versions that were served, in order."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert not self.wrong
        return [version for version in self.versions if version is not None]


@pytest.mark.trap(58, 64)
def test_a_replica_is_not_resumed_without_its_orchestrator_and_catches_up_with_the_next(tmp_path: Path) -> None:
    with serve_store() as store, Orchestrated(store.url, "orchestrated", REPLICAS, tmp_path) as company:
        for name in (*SOURCES, ORCHESTRATOR):
            company.until(name, "open")
        company.offer()
        while company.ended().keys() != set(REPLICAS):
            company.offer()
        for replica in REPLICAS:
            company.until(replica, "serves", company.version)
        before = company.version
        readers = {replica: Reader(company, replica) for replica in REPLICAS}

        company.tell("struck", "halt in the next version")
        version = company.offer()
        company.until("struck", "paused", version)
        company.until("steady", "serves", version)
        company.kill(ORCHESTRATOR)
        company.tell("struck", "go on")
        assert company.ended() == dict.fromkeys(REPLICAS)
        struck = company.engine("struck")
        assert struck.read() is None, "it has the whole version, but nobody has resumed it"

        company.orchestrate()
        company.until("struck", "serves", version)
        assert struck.read() == (version, [])
        company.offer()
        assert company.ended() == dict.fromkeys(REPLICAS)
        for replica in REPLICAS:
            company.until(replica, "serves", company.version)
        states = replica_states(store.url, "orchestrated", Deadline.after(60))
        assert {name: (state.doing, state.version) for name, state in states.items()} == dict.fromkeys(
            REPLICAS, (Doing.SERVING, company.version)
        )
        for reader in readers.values():
            served = reader.end()
            assert served == sorted(set(served)), "no version comes back"
            assert set(served) <= {before, version, company.version}
