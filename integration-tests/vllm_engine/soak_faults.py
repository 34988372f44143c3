"""Random faults of `soak_case.py`."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from soak_trainer import Trainer
from soak_worker import strike
from support.fault_matrix import Store

WEIGHTS = {
    "kill the trainer": 4, "freeze the trainer": 4, "freeze the engine": 2, "cut": 4, "cut from the store": 2,
    "delay": 3, "corrupt": 4, "freeze the store": 2, "lose the store": 1,
}  # fmt: skip
LONGEST_FREEZE_SECONDS = 7.0
BUCKETS = 20
"""Faults that wait until bytes are on their way wait for up to so many buckets."""
_LOOK_SECONDS = 0.05


class Strikes:
    """Who strikes, and puts right again what does not end by itself."""

    def __init__(
        self, chance: random.Random, trainer: Trainer, store: Store, worker: Callable[..., Awaitable[Any]], engine: int
    ) -> None:
        self._random, self._trainer, self._store, self._worker, self._engine = chance, trainer, store, worker, engine
        self.on = asyncio.Event()
        """Whether there are any."""
        self.lost_store = False
        """Whether the store has come back with nothing in it, and all have to join anew."""
        self.done: Counter[str] = Counter()
        self._due: set[asyncio.Task[Any]] = set()
        self._frozen: dict[int, float] = {}
        """By process: when it goes on."""

    async def strike_for_ever(self, between: float) -> None:
        """One fault after the other, while they are on."""
        while True:
            await asyncio.sleep(self._random.expovariate(1 / between))
            await self.on.wait()
            self._strike()

    async def thaw_for_ever(self) -> None:
        """Let processes that stand still go on after a while."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for name, number in (("trainer", self._trainer.process_id), ("engine", self._engine)):
                if number is None or not _stopped(number):
                    continue
                if number not in self._frozen:
                    self.done[f"freeze the {name}"] += 1
                    self._frozen[number] = time.monotonic() + self._seconds()
                if time.monotonic() >= self._frozen[number]:
                    del self._frozen[number]
                    os.kill(number, signal.SIGCONT)

    async def quiet(self) -> None:
        """Faults are off: wait for what is still to be put right, and have nobody wait for an occasion any more."""
        while self._due:
            await asyncio.wait(self._due)
        self._trainer.tell("calm")
        while any(_stopped(each) for each in (self._trainer.process_id, self._engine) if each is not None):
            await asyncio.sleep(_LOOK_SECONDS)

    def _seconds(self) -> float:
        return self._random.uniform(0.05, LONGEST_FREEZE_SECONDS) * self._random.random()

    def _strike(self) -> None:
        """One random fault, unless what it would strike is down already."""
        what = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        seed, seconds = self._random.getrandbits(32), self._seconds()
        midway, buckets = self._random.random() < 0.6, self._random.randrange(BUCKETS)
        at_engine = what == "corrupt" or (what in ("delay", "cut from the store") and self._random.random() < 0.5)
        if not self._trainer.alive or self._due:
            return
        if not what.startswith(("freeze the trainer", "freeze the engine", "kill")):  # those are counted when found
            self.done[what] += 1
        match what:
            case "kill the trainer" | "freeze the trainer" | "cut" if midway:
                self._trainer.tell("midway", buckets, what.split()[0], seed, seconds)
            case "kill the trainer":
                self._trainer.strike(signal.SIGKILL)
            case "freeze the trainer":
                self._trainer.strike(signal.SIGSTOP)
            case "freeze the engine":
                os.kill(self._engine, signal.SIGSTOP)
            case "freeze the store":
                self._later(self._freeze_store(seconds / 2))
            case "lose the store":
                self._later(self._lose_store(seconds / 2))
            case _ if at_engine:
                self._later(self._worker(strike, what, seed, seconds))
            case _:
                self._trainer.tell(what, seed, seconds)

    def _later(self, fault: Awaitable[None]) -> None:
        task = asyncio.ensure_future(fault)
        self._due.add(task)
        task.add_done_callback(self._due.discard)

    async def _freeze_store(self, seconds: float) -> None:
        self._store.freeze()
        await asyncio.sleep(seconds)
        self._store.thaw()

    async def _lose_store(self, seconds: float) -> None:
        self._store.kill()
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self._store.start)
        self.lost_store = True


def _stopped(number: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
