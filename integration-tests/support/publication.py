"""A publisher and subscribers in processes of their own, which can be stopped in the middle of a version."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import weft.publication.holders
from weft.contracts import Bucket
from weft.deadline import Deadlines
from weft.errors import RefitAbortedError
from weft.member import Tag
from weft.publication import Publisher, Subscriber
from weft.testing.faults import Script, install
from weft.testing.members import MemoryControl, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

TINY = Tiny()
TRAINER = "trainer"
PINNED = "pinned"
_SECONDS = 120.0


class Halt(Script):
    """Says when bytes are about to leave, if it was told to, and waits for ever."""

    def __init__(self, pipe: Connection, *, listens: bool) -> None:
        self._pipe, self._listens = pipe, listens

    def posting(self, bucket: Bucket, tag: Tag) -> None:
        """See `Script.posting`."""
        if self._listens and self._pipe.poll():
            self._pipe.send(("gives", tag.version))
            self._pipe.recv()
            self._pipe.recv()


def play(name: str, store: str, job: str, transport: str, lease_seconds: float, pipe: Connection) -> None:
    """One process, until it is killed."""
    torch.set_num_threads(1)
    weft.publication.holders.LEASE_SECONDS = lease_seconds
    limits = dict.fromkeys(("begin", "move", "vote", "commit"), 8.0)
    halt = Halt(pipe, listens=name not in (TRAINER, PINNED))
    common: dict[str, Any] = {
        "store": store, "job": job, "name": f"{name}/0", "transport": "faulty",
        "transport_options": {"transport": transport, "transport_options": {}, "script": halt},
        "deadlines": Deadlines(rendezvous=_SECONDS, offer=600, **limits),
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        install(Path(folder))
        sys.path.insert(0, folder)
        plays = {TRAINER: train, PINNED: follow}.get(name)
        plays(pipe, common) if plays is not None else serve(name, pipe, common)


def train(pipe: Connection, common: dict[str, Any]) -> None:
    """Publishes the versions that it is told to."""
    source = MemorySource("trainer/0", TINY.source(0, 1))
    with Publisher(source=source, rank=0, members=1, retain=2, **common) as publisher:
        while True:
            version = pipe.recv()
            source.load(TINY.tensors(version))
            publisher.publish(version)
            source.load(TINY.tensors(0))


def follow(pipe: Connection, common: dict[str, Any]) -> None:
    """Reads the versions that it is told to, and says what it has."""
    target = MemoryTarget(PINNED, TINY.target(0, 1))
    with Subscriber(target=target, replica=PINNED, **common) as subscriber:
        while True:
            version = pipe.recv()
            target.poison()
            try:
                subscriber.receive(version=version)
            except RefitAbortedError as error:
                pipe.send(("refused", version, str(error)))
            else:
                wrong = mismatches(target.contents(), TINY.expected(0, 1, TINY.tensors(version)))
                pipe.send(("serves", version, wrong))


def serve(name: str, pipe: Connection, common: dict[str, Any]) -> None:
    """Reads every version that it can, passes it on, and says what it has and from whom."""
    target, control = MemoryTarget(name, TINY.target(0, 1)), MemoryControl(name)
    with Subscriber(target=target, control=control, replica=name, relay=True, **common) as subscriber:
        while True:
            target.poison()
            version = subscriber.receive().version
            wrong = mismatches(target.contents(), TINY.expected(0, 1, TINY.tensors(version)))
            pipe.send(("serves", version, wrong, subscriber.holder, control.served))


@dataclass(eq=False)
class Audience:
    """All processes of a job. A context manager that leaves none behind."""

    store: str
    job: str
    transport: str
    lease_seconds: float = weft.publication.holders.LEASE_SECONDS

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[str, tuple[Any, Connection]] = {}

    def __enter__(self) -> Audience:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.kill(name)

    def start(self, *names: str) -> None:
        """Start processes, under these names, which may have had others before."""
        for name in names:
            near, far = self._context.Pipe()
            arguments = (name, self.store, self.job, self.transport, self.lease_seconds, far)
            process = self._context.Process(target=play, args=arguments, daemon=True)
            process.start()
            far.close()
            self._running[name] = (process, near)

    def kill(self, name: str) -> None:
        """SIGKILL."""
        process, pipe = self._running.pop(name)
        process.kill()
        process.join(10)
        pipe.close()

    def signal(self, name: str, number: signal.Signals) -> None:
        """SIGSTOP, SIGCONT."""
        os.kill(self._running[name][0].pid, number)

    def tell(self, name: str, what: object) -> None:
        """Send to a process."""
        self._running[name][1].send(what)

    def until(self, name: str, *what: object) -> tuple[Any, ...]:
        """Wait for a process to say something that begins so; returns the rest. What it said before is forgotten."""
        pipe, said = self._running[name][1], []
        while True:
            assert pipe.poll(_SECONDS), f"{name} never said {what}, but {said}"
            said.append(pipe.recv())
            if said[-1][: len(what)] == what:
                rest: tuple[Any, ...] = said[-1][len(what) :]
                return rest
