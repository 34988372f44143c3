"""The trainer of `soak_case.py` in a process of its own, and what is done to it. Without vLLM: it is to start soon."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from sources import CheckpointSource
from support.soak_member import Faults

from weft.contracts import Bucket
from weft.deadline import Deadlines
from weft.errors import DeadlineError, RefitAbortedError, WeftError
from weft.member import Tag
from weft.policy import Policy
from weft.publication import Publisher
from weft.refit import Refit
from weft.roster import Expect
from weft.testing.faults import install

_START_SECONDS = 180.0
_SAID_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """Plain data that trainer and engine share."""

    drive: str
    transport: str
    policy: dict[str, Any]
    deadlines: dict[str, float]
    store: str

    def options(self, faults: Faults) -> dict[str, Any]:
        """Of a member's transport."""
        return {"transport": self.transport, "transport_options": {}, "script": faults}

    def faults(self) -> MidwayFaults:
        """For one process."""
        return MidwayFaults(int(self.store.rsplit(":", 1)[1]))


class MidwayFaults(Faults):
    """Faults of a process, also such that wait until bytes are on their way."""

    def __init__(self, store_port: int) -> None:
        super().__init__(store_port)
        self._buckets = 0
        """Still to leave before the fault."""
        self._fault: tuple[str, int, float] | None = None

    def wait(self, buckets: int, what: str, seed: int, seconds: float) -> None:
        """Do it when that many buckets have left."""
        self._buckets, self._fault = buckets, (what, seed, seconds)

    def posting(self, bucket: Bucket, tag: Tag) -> None:
        """See `Script.posting`."""
        self._buckets -= 1
        if self._fault is not None and self._buckets < 0:
            fault, self._fault = self._fault, None
            self.do(*fault)

    def calm(self) -> None:
        """Do nothing any more."""
        self._fault, self._flip, self._delay_until = None, False, 0.0

    def do(self, what: str, seed: int, seconds: float) -> None:
        """See `Faults.do`."""
        match what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)  # whoever has sent this thaws it
            case _:
                super().do(what, seed, seconds)


def train(job: Job, folder: str, pipe: Connection) -> None:
    """The process of the trainer, until it is killed or cannot go on. It says `open`, then what became of versions."""
    torch.set_num_threads(1)
    faults = job.faults()
    told: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, faults, told), daemon=True).start()
    common: dict[str, Any] = {
        "store": job.store, "job": "soak", "name": "trainer/0", "transport": "faulty",
        "transport_options": job.options(faults), "deadlines": Deadlines(**job.deadlines),
        "policy": msgspec.convert(job.policy, Policy),
    }  # fmt: skip
    source = CheckpointSource(checkpoint(folder, 0), 0, 1)
    with TemporaryDirectory() as plugins:
        install(Path(plugins))
        sys.path.insert(0, plugins)
        try:
            (_publish if job.drive == "published" else _offer)(source, folder, pipe, told, common)
        except WeftError as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}"))


def checkpoint(folder: str, code: int) -> str:
    """Where the weights of a code are."""
    return f"{folder}/{code}/model.safetensors"


def _listen(pipe: Connection, faults: MidwayFaults, told: queue.SimpleQueue[tuple[int, int]]) -> None:
    with suppress(EOFError, OSError):
        while True:
            what, *arguments = pipe.recv()
            match what:
                case "version":
                    told.put((arguments[0], arguments[1]))
                case "calm":
                    faults.calm()
                case "midway":
                    faults.wait(*arguments)
                case _:
                    faults.do(what, *arguments)
    os._exit(1)  # nobody is there any more


def _publish(
    source: CheckpointSource, folder: str, pipe: Connection, told: queue.SimpleQueue[tuple[int, int]],
    common: dict[str, Any],
) -> None:  # fmt: skip
    with Publisher(source=source, rank=0, members=1, **common) as publisher:
        pipe.send(("open",))
        while True:
            version, code = told.get()
            source.load(checkpoint(folder, code))
            publisher.publish(version)
            _spoil(source)
            pipe.send(("published", version))


def _offer(
    source: CheckpointSource, folder: str, pipe: Connection, told: queue.SimpleQueue[tuple[int, int]],
    common: dict[str, Any],
) -> None:  # fmt: skip
    with Refit(source=source, expect=Expect(1, 1), **common) as refit:
        pipe.send(("open",))
        while True:
            version, code = told.get()
            source.load(checkpoint(folder, code))
            offer = refit.offer(version)
            with suppress(RefitAbortedError, DeadlineError):
                offer.released()
                _spoil(source)
                offer.committed()
            pipe.send(("ended", version))


def _spoil(source: CheckpointSource) -> None:
    """The trainer's weights go on changing."""
    for tensor in source.memory().values():
        tensor.fill_(float("nan"))


class Trainer:
    """The process, from outside: one life after the other."""

    def __init__(self, job: Job, folder: str, codes: int) -> None:
        self._job, self._folder, self._codes = job, folder, codes
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self.killed = 0
        """Lives that have ended by a fault."""

    @property
    def alive(self) -> bool:
        """Whether it has opened the job and still runs."""
        return self._process is not None and self._process.is_alive()

    @property
    def process_id(self) -> int | None:
        """Of the process, if it runs."""
        return self._process.pid if self.alive else None

    async def start(self) -> None:
        """Begin a life, and wait until it has opened the job."""
        self.kill()
        self._pipe, far = self._context.Pipe()
        self._process = self._context.Process(target=train, args=(self._job, self._folder, far), daemon=True)
        self._process.start()
        far.close()
        said = await self._hear(_START_SECONDS)
        if said[0] != "open":
            raise ConnectionError(f"the trainer says {said}")

    async def offer(self, version: int) -> None:
        """Have it offer a version, in a new life if need be, and wait until that has ended. Raises `ConnectionError`
        when it is killed meanwhile, or gives up.
        """
        if not self.alive:
            await self.start()
        self.tell("version", version, version % self._codes)
        while (said := await self._hear(_SAID_SECONDS))[1:] != (version,):
            if said[0] == "failed":
                self.kill()
                raise ConnectionError(f"the trainer gives up: {said[1]}")

    def tell(self, *what: Any) -> None:
        """Send to it, if it lives."""
        if self.alive:
            with suppress(OSError):  # it dies just now
                self._pipe.send(what)

    def strike(self, number: signal.Signals) -> None:
        """A signal."""
        if (found := self.process_id) is not None:
            os.kill(found, number)

    def kill(self) -> None:
        """End its life, if it has one."""
        if self._process is not None:
            self.killed += self._process.exitcode == -signal.SIGKILL
            self._process.kill()
            self._process.join(10)
            self._pipe.close()
            self._process = None

    async def _hear(self, seconds: float) -> tuple[Any, ...]:
        limit = time.monotonic() + seconds
        try:
            while not self._pipe.poll():
                if time.monotonic() > limit:
                    raise ConnectionError(f"the trainer says nothing for {seconds} s")
                await asyncio.sleep(5e-3)
            said: tuple[Any, ...] = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise ConnectionError("the trainer was killed") from error
        return said
