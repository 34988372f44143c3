"""A fleet whose engines only an orchestrator pauses and resumes: members and orchestrator in processes of their own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from support.fleet import SOURCES, TINY
from support.troupe import Troupe

from weft.deadline import Deadline, Deadlines
from weft.fleet import Fleet, FleetMember
from weft.orchestration import Orchestrator, RemoteControl
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import mismatches

ORCHESTRATOR = "orchestrator"
SECONDS = 120.0


class Engine:
    """Answers reads of its weights while it serves, and whoever reaches its socket may pause and resume it."""

    def __init__(self, target: MemoryTarget, socket: Path) -> None:
        self._target, self._lock = target, threading.Lock()
        self._served: int | None = None
        self._listener = Listener(str(socket), "AF_UNIX", backlog=16)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            threading.Thread(target=self._talk, args=(self._listener.accept(),), daemon=True).start()

    def _talk(self, caller: Connection) -> None:
        with caller:
            what, argument = caller.recv()
            with self._lock:  # nobody pauses in the middle of a read
                if what == "read":
                    caller.send(self._read())
                    return
                self._served = argument if what == "resume" else None
                caller.send("done")

    def _read(self) -> tuple[int, list[str]] | None:
        """The version that is served, and where the weights are of another; None where nothing is served."""
        if self._served is None:
            return None
        return self._served, mismatches(self._target.contents(), TINY.expected(0, 1, TINY.tensors(self._served)))


class EngineControl:
    """Implements `weft.contracts.ReplicaControl` of an engine in another process, which it reaches by its socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def pause(self, mode: str, deadline: Deadline) -> None:
        self._call("pause", mode)

    def invalidate_caches(self, version: int) -> None:
        pass

    def resume(self, version: int) -> None:
        self._call("resume", version)

    def refuse(self, reason: str) -> None:
        self._call("refuse", reason)

    def read(self) -> tuple[int, list[str]] | None:
        """What the engine answers to one who wants to be served."""
        found: tuple[int, list[str]] | None = self._call("read", None)
        return found

    def _call(self, what: str, argument: object) -> Any:
        with Client(str(self._socket), "AF_UNIX") as engine:
            engine.send((what, argument))
            assert engine.poll(SECONDS), "the engine does not answer"
            return engine.recv()


def orchestrate(store: str, job: str, replicas: Sequence[str], folder: Path, pipe: Connection) -> None:
    """The orchestrator, until it is killed."""
    controls = {replica: EngineControl(folder / replica) for replica in replicas}
    with Orchestrator(store=store, job=job, controls=controls, lease_seconds=SECONDS) as orchestrator:
        pipe.send(("open",))
        orchestrator.serve()


def train(common: dict[str, Any], pipe: Connection) -> None:
    """A source: a version whenever it is told to; says how each replica ended."""
    rank = SOURCES.index(common["name"])
    source = MemorySource(common["name"], TINY.source(rank, len(SOURCES)))
    with Fleet(source=source, rank=rank, sources=len(SOURCES), transport="gloo", **common) as fleet:
        pipe.send(("open",))
        while True:
            (version,) = pipe.recv()
            source.load(TINY.tensors(version))
            offer = fleet.offer(version)
            offer.released()
            source.load(TINY.tensors(0))
            offer.committed()
            pipe.send(("ended", version, offer.outcomes))


def serve(common: dict[str, Any], replica: str, folder: Path, pipe: Connection) -> None:
    """A replica of one member: receives whatever is offered, and says what it has; told to, it halts while paused."""

    def halt(what: str, version: object) -> None:
        if what == "begin" and pipe.poll():  # the engine is paused by now
            pipe.recv()
            pipe.send(("paused", version))
            pipe.recv()

    target = MemoryTarget(common["name"], TINY.target(0, 1), before=halt)
    Engine(target, folder / replica)
    with ExitStack() as stack:
        control = RemoteControl(store=common["store"], job=common["job"], replica=replica, seconds=SECONDS)
        member = FleetMember(
            target=target, control=stack.enter_context(control), replica=replica, sources=len(SOURCES),
            transport="gloo", **common,
        )  # fmt: skip
        stack.enter_context(member)
        while True:
            pipe.send(("serves", member.receive().version))


class Orchestrated(Troupe):
    """Two sources, replicas of one member each, and their orchestrator, in processes; none is left behind."""

    def __init__(self, store: str, job: str, replicas: Sequence[str], folder: Path) -> None:
        super().__init__("forkserver", ["torch", "weft.fleet", "weft.testing.members", "weft_gloo"])
        self.replicas, self.version = replicas, 0
        self._store, self._job, self._folder = store, job, folder

    def __enter__(self) -> Orchestrated:
        limits = Deadlines(**dict.fromkeys(("rendezvous", "offer", "begin", "move", "vote", "commit"), SECONDS))
        common = {"store": self._store, "job": self._job, "deadlines": limits}
        self.orchestrate()
        for name in SOURCES:
            self.begin(name, train, {**common, "name": name})
        for replica in self.replicas:
            self.begin(replica, serve, {**common, "name": f"{replica}/0"}, replica, self._folder)
        return self

    def orchestrate(self) -> None:
        """Start the orchestrator."""
        self.begin(ORCHESTRATOR, orchestrate, self._store, self._job, self.replicas, self._folder)

    def offer(self) -> int:
        """Have the trainer offer the next version."""
        self.version += 1
        for name in SOURCES:
            self.tell(name, self.version)
        return self.version

    def ended(self) -> dict[str, str | None]:
        """How each replica has ended."""
        outcomes = [self.until(name, "ended", self.version)[2] for name in SOURCES]
        return {name: reason for each in outcomes for name, reason in each.items()}

    def engine(self, replica: str) -> EngineControl:
        """What reaches a replica's engine."""
        return EngineControl(self._folder / replica)
