"""The members of a fleet in processes of their own, which stop at a step of the protocol so that a test can strike."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from support.troupe import Troupe

from weft.contracts import Bucket, Message
from weft.deadline import Deadlines
from weft.errors import DeadlineError, RefitAbortedError, WeftError
from weft.fleet import Fleet, FleetMember
from weft.member import Tag
from weft.policy import Policy
from weft.protocol.events import Step
from weft.testing.faults import FaultyTransport, Script, install
from weft.testing.members import MemoryControl, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches
from weft.wire import Notice

TINY = Tiny()
SOURCES = ("trainer/0", "trainer/1")
STRUCK = "struck"
SIGNALS = {
    "source-offered": Step.OFFER, "begun": Step.BEGIN, "verified": Step.VERIFY, "prepare": Step.VOTE,
    "prepared": Step.PREPARE_COMMIT, "committed": Step.COMMIT, "installed": Step.RESUME,
}  # fmt: skip
"""What a member says at the end of a step. Bytes that leave are `Step.MOVE`."""
PRELOADED = ["torch", "weft.fleet", "weft.testing.members", "weft_gloo", "weft_nixl"]
"""What takes long to import: processes are forked from one that has."""


@dataclass(frozen=True, slots=True)
class Role:
    """What one process is. Everything that crosses to it is plain data."""

    name: str
    store: str
    job: str
    transport: str
    size: int = 1
    """Members of its replica."""
    limits: float = 8.0
    """Seconds of every deadline but the rendezvous."""
    landing: str = "in_place"
    options: tuple[tuple[str, Any], ...] = ()
    """Of the transport."""
    model: Any = TINY
    """What is trained: `Tiny`, or something with its methods."""


class Stop(Script):
    """Says that a step is reached in a version, and waits to be told to go on. Bytes that leave count where they are
    for the replica `STRUCK`.
    """

    def __init__(self, pipe: Connection, *, listens: bool) -> None:
        """One that listens is told over the pipe where to stop, at any time."""
        self._pipe, self._listens = pipe, listens
        self.at: tuple[str, int] | None = None
        self.corrupts = False
        """Whether a byte of what arrives next is to change."""

    def signalling(self, peer: str, tag: Tag, note: bytes) -> bool:
        """See `Script.signalling`."""
        kind = msgspec.msgpack.decode(note, type=Notice).kind
        self.reach(SIGNALS.get(kind), tag.version)
        return True

    def posting(self, bucket: Bucket, tag: Tag) -> None:
        """See `Script.posting`."""
        self.reach(Step.MOVE if bucket.peer.startswith(f"{STRUCK}/") else None, tag.version)

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        """See `Script.arriving`."""
        if self.corrupts and messages:
            self.corrupts, first = False, messages[0]
            if first.bucket is not None:
                endpoint.flip(first.bucket)
            else:
                messages[0] = replace(first, note=bytes([first.note[0] ^ 0x10]) + first.note[1:])
        return messages

    def reach(self, step: Step | None, version: int) -> None:
        """This process is at a step of a version, if at any: stop there when told so."""
        if self._listens and self._pipe.poll():
            self.at = self._pipe.recv()
        if self.at is not None and step is not None and self.at == (step.value, version):
            self.at = None
            self._pipe.send(("at", step.value, version))
            assert self._pipe.recv() == ("go on",)


def cut_connections() -> None:
    """End every TCP connection of this process; new ones are made as before."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # closed since, or not connected
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as end:
                    listens = end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    if end.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                        end.shutdown(socket.SHUT_RDWR)


def play(role: Role, struck: Connection, pipe: Connection) -> None:
    """One process, until it is killed or told to close. SIGUSR1 cuts it off, SIGUSR2 corrupts what arrives next, and
    each is acknowledged.
    """
    torch.set_num_threads(1)
    stop = Stop(pipe, listens=role.name not in SOURCES)

    def strike(number: int, _: object) -> None:
        if number == signal.SIGUSR1:
            cut_connections()
        else:
            stop.corrupts = True
        struck.send(number)

    signal.signal(signal.SIGUSR1, strike)
    signal.signal(signal.SIGUSR2, strike)
    limits = dict.fromkeys(("begin", "move", "vote", "commit"), role.limits)
    common: dict[str, Any] = {
        "store": role.store, "job": role.job, "name": role.name, "transport": "faulty",
        "transport_options": {"transport": role.transport, "transport_options": dict(role.options), "script": stop},
        "deadlines": Deadlines(rendezvous=120, offer=300, **limits), "policy": Policy(landing=role.landing),
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        install(Path(folder))
        sys.path.insert(0, folder)
        (train if role.name in SOURCES else serve)(role, pipe, stop, common)


def train(role: Role, pipe: Connection, stop: Stop, common: dict[str, Any]) -> None:
    """A source: a version whenever it is told to, with a step to stop at; says how each replica ended, or that it
    cannot offer any more.
    """
    rank = SOURCES.index(role.name)
    source = MemorySource(role.name, role.model.source(rank, len(SOURCES)))
    with Fleet(source=source, rank=rank, sources=len(SOURCES), **common) as fleet:
        pipe.send(("open", sorted(fleet.replicas)))
        while (told := pipe.recv()) != ("close",):
            _, version, step = told
            stop.at = (step, version) if step else None
            source.load(role.model.tensors(version))
            try:
                offer = fleet.offer(version)
            except WeftError as error:
                pipe.send(("gave up", version, f"{type(error).__name__}: {error}"))
                continue
            with suppress(DeadlineError):
                offer.released()
            source.load(role.model.tensors(0))
            with suppress(RefitAbortedError, DeadlineError):
                offer.committed()
            pipe.send(("ended", version, offer.outcomes))


def serve(role: Role, pipe: Connection, _: Stop, common: dict[str, Any]) -> None:
    """A target: receives whatever is offered, joins anew after every failure, and says what it holds and what of that
    is wrong.
    """
    replica, rank = role.name.split("/")
    target = MemoryTarget(
        role.name, role.model.target(int(rank), role.size), before=lambda what, _: what == "begin" and target.poison()
    )
    control = MemoryControl(role.name)

    def wrong(version: int) -> list[str]:
        return mismatches(target.contents(), role.model.expected(int(rank), role.size, role.model.tensors(version)))

    while True:
        try:
            with FleetMember(
                target=target, control=control, replica=replica, replica_size=role.size, sources=len(SOURCES), **common
            ) as member:
                pipe.send(("joined",))
                while True:
                    version = member.receive().version
                    pipe.send(("serves", version, wrong(version), time.monotonic()))
        except WeftError as error:
            served = control.served
            mixed = [] if served in (None, -1) else wrong(served)
            pipe.send(("failed", type(error).__name__, str(error), mixed, served, control.refused))


@dataclass(eq=False)
class Company(Troupe):
    """All processes of a fleet. A context manager that leaves none behind."""

    store: str
    job: str
    transport: str
    landing: str = "in_place"
    limits: float = 8.0
    options: dict[str, Any] = field(default_factory=dict)
    """Of the transport."""
    model: Any = TINY
    version: int = 0

    def __post_init__(self) -> None:
        super().__init__("forkserver", PRELOADED)
        self._struck: dict[str, Connection] = {}

    def start(self, *names: str, size: int = 1) -> None:
        """Start processes, under these names, which may have had others before."""
        for name in names:
            self._struck[name], striking = self._context.Pipe(duplex=False)
            options = tuple(self.options.items())
            role = Role(
                name, self.store, self.job, self.transport, size, self.limits, self.landing, options, self.model
            )  # fmt: skip
            self.begin(name, play, role, striking)
            striking.close()

    def kill(self, name: str) -> None:
        """SIGKILL."""
        super().kill(name)
        self._struck[name].close()

    def gone(self) -> list[str]:
        """Whose process has ended by itself."""
        return [name for name, process in self._processes.items() if not process.is_alive()]

    def cut(self, name: str) -> None:
        """End all its TCP connections."""
        self._strike(name, signal.SIGUSR1)

    def corrupt(self, name: str) -> None:
        """Change a byte of what arrives there next."""
        self._strike(name, signal.SIGUSR2)

    def _strike(self, name: str, number: int) -> None:
        os.kill(self._processes[name].pid, number)
        assert self._struck[name].poll(60), f"{name} has not been struck: {self.said[name]}"
        self._struck[name].recv()

    def offer(self, step: Step | None = None, at: str = "") -> int:
        """Have the trainer offer the next version; `at`, a source, stops at a step of it."""
        self.version += 1
        for name in SOURCES:
            self.tell(name, "offer", self.version, step.value if step and at == name else None)
        return self.version

    def ended(self, version: int) -> dict[str, str | None]:
        """How each replica has ended, on which both sources must agree about those that committed."""
        first, second = (self.until(name, "ended", version)[2] for name in SOURCES)
        assert {n for n, reason in first.items() if reason is None} == {n for n, why in second.items() if why is None}
        outcomes: dict[str, str | None] = first
        return outcomes
