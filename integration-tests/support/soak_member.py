"""The processes of `support.soak`: sources and targets of a fleet that faults are done to."""

from __future__ import annotations

import os
import queue
import random
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import torch
from support.holding import holding
from support.soak_engine import TINY, Engine, NoLog, SharedTarget

from weft.contracts import Message
from weft.deadline import Deadlines
from weft.errors import DeadlineError, RefitAbortedError, WeftError
from weft.fleet import Fleet, FleetMember
from weft.policy import Policy
from weft.testing.faults import FaultyTransport, Script, install
from weft.testing.members import MemorySource

SOURCES = ("trainer/0", "trainer/1")
Say = Callable[..., None]
"""Tells whoever has started the process, from any thread."""
BEGIN_SECONDS = 3.0
"""Of every deadline but those of meeting each other: what is frozen for longer is given up."""


@dataclass(frozen=True, slots=True)
class Role:
    """What one process is. Everything that crosses to it is plain data."""

    name: str
    store: str
    job: str
    transport: str
    landing: str
    folder: str
    """Where replicas keep what outlives their processes."""
    size: int
    """Members of its replica."""


class Faults(Script):
    """What is done to the traffic of one process, and is told over the pipe at any time."""

    def __init__(self, store_port: int) -> None:
        self._store_port = store_port
        self._late: WeakKeyDictionary[FaultyTransport, deque[tuple[float, Message]]] = WeakKeyDictionary()
        self._delay_until = 0.0
        self._flip = False
        self.random = random.Random()
        self.flipped: set[int] = set()
        """Versions of which a byte was changed on the way."""

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        """Change bytes, and keep messages back for a random time, in order."""
        for message in messages:
            if self._flip and message.bucket is not None:
                self._flip = False
                self.flipped.add(message.tag.version)
                endpoint.flip(message.bucket)
        held, now = self._late.setdefault(endpoint, deque()), time.monotonic()
        for message in messages:
            wait = self.random.uniform(0, 0.1) if now < self._delay_until else 0.0
            held.append((max(now + wait, held[-1][0] if held else 0.0), message))
        due = []
        while held and held[0][0] <= now:
            due.append(held.popleft()[1])
        return due

    def do(self, what: str, seed: int, seconds: float) -> None:
        """One fault, in any thread."""
        self.random.seed(seed)
        match what:
            case "delay":
                self._delay_until = time.monotonic() + seconds
            case "corrupt":
                self._flip = True
            case "cut":
                self._cut(store=False)
            case "cut from the store":
                self._cut(store=True)

    def _cut(self, *, store: bool) -> None:
        """End some connections of this process, at least one, if there are any: all, or a random part of them."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(found) for found in map(_socket, os.listdir("/proc/self/fd")) if found]
            links = [each for each in sockets if (port := _peer_port(each)) and (port == self._store_port) is store]
            for link in self.random.sample(links, self.random.randint(min(1, len(links)), len(links))):
                with suppress(OSError):  # it has ended meanwhile
                    link.shutdown(socket.SHUT_RDWR)


def _socket(descriptor: str) -> socket.socket | None:
    """Another handle of an open descriptor, if it is a socket."""
    with suppress(OSError):  # closed meanwhile
        if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{descriptor}").st_mode):
            return socket.socket(fileno=os.dup(int(descriptor)))
    return None


def _peer_port(link: socket.socket) -> int:
    """The other end's port of a TCP connection, else 0."""
    with suppress(OSError):  # it listens
        return int(link.getpeername()[1]) if link.family == socket.AF_INET else 0
    return 0


def play(role: Role, pipe: Connection) -> None:
    """One process, until it is killed."""
    torch.set_num_threads(1)
    faults = Faults(int(role.store.rsplit(":", 1)[1]))
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    lock = threading.Lock()

    def say(*what: Any) -> None:
        with lock:  # two threads do
            pipe.send(what)

    threading.Thread(target=_listen, args=(pipe, say, faults, told), daemon=True).start()
    limits = dict.fromkeys(("begin", "move", "vote", "commit"), BEGIN_SECONDS)
    common: dict[str, Any] = {
        "store": role.store, "job": role.job, "name": role.name, "transport": "faulty",
        "transport_options": {"transport": role.transport, "transport_options": {}, "script": faults},
        "deadlines": Deadlines(rendezvous=60, offer=60, **limits), "policy": Policy(landing=role.landing),
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        install(Path(folder))
        sys.path.insert(0, folder)
        if role.name in SOURCES:
            _train(role, say, told, common)
        else:
            _serve(role, say, faults, common)


def _listen(pipe: Connection, say: Say, faults: Faults, told: queue.SimpleQueue[int]) -> None:
    with suppress(EOFError, OSError):
        while True:
            what, *arguments = pipe.recv()
            if what == "offer":
                told.put(*arguments)
            elif what == "count":
                say("holds", holding())
            else:
                faults.do(what, *arguments)
    os._exit(1)  # nobody is there any more


def _train(role: Role, say: Say, told: queue.SimpleQueue[int], common: dict[str, Any]) -> None:
    """A source: a version whenever it is told to, of which nothing is left once it is released."""
    rank = SOURCES.index(role.name)
    source = MemorySource(role.name, TINY.source(rank, len(SOURCES)), log=NoLog())
    try:
        with Fleet(source=source, rank=rank, sources=len(SOURCES), **common) as fleet:
            say("open")
            while True:
                version = told.get()
                source.load(TINY.tensors(version))
                source.leases.clear()  # none is held
                offer = fleet.offer(version)
                with suppress(RefitAbortedError, DeadlineError):
                    offer.released()
                    source.load(TINY.tensors(0))
                    offer.committed()
                say("ended", version, offer.outcomes)
    except WeftError as error:
        say("failed", f"{type(error).__name__}: {error}")


def _serve(role: Role, say: Say, faults: Faults, common: dict[str, Any]) -> None:
    """A target: receives whatever is offered, and joins anew after every failure. The first one of a replica answers
    for it all the time.
    """
    replica, rank = role.name.split("/")
    target = SharedTarget(Path(role.folder), replica, int(rank), role.size)
    engine = None
    if rank == "0":
        engine = Engine(Path(role.folder), replica, role.size)
        threading.Thread(target=engine.answer_for_ever, daemon=True).start()
    while True:
        try:
            with FleetMember(
                target=target, control=engine, replica=replica, replica_size=role.size, sources=len(SOURCES), **common
            ) as member:
                while True:
                    version = member.receive().version
                    say("installed", version, version in faults.flipped)
        except WeftError as error:
            say("failed", f"{type(error).__name__}: {error}")
