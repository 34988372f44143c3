"""A cheap engine that answers all the time: what a replica of `support.soak` serves, and to whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from weft.deadline import Deadline
from weft.errors import DeadlineError
from weft.testing.members import Log, MemoryTarget, allocate
from weft.testing.tiny import Tiny, mismatches

TINY = Tiny()
FIGURES = ("reads", "waited", "refused", "lost", "reading", "version", "versions", "last", "longest")
"""What a replica counts. `waited`: reads that came while it was paused and were answered afterwards. `refused`: there
was no whole version, so the client asks again. `lost`: a member died under it. `reading`: one runs now. `version`: of
the last answer. `versions`: how many different ones. `last`: when that was. `longest`: between two answers. Times in
nanoseconds of the machine's monotonic clock.
"""
_LAYER_SECONDS = 2e-4
"""What a read does not look at goes on changing for so long, if anything changes at all."""
_AGAIN_SECONDS = 5e-3


def arena(folder: Path, member: str) -> Path:
    """Where the weights of a member are."""
    return folder / member.replace("/", "-")


def shared(path: Path, memory: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same buffers in a file, which all processes of the replica see."""
    nbytes = max(tensor.untyped_storage().nbytes() for tensor in memory.values())
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=nbytes)
    return {
        name: torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        for name, tensor in memory.items()
    }


def prepare(folder: Path, replica: str, size: int) -> None:
    """Files for a replica that has not lived so far."""
    np.zeros(size, np.int64).tofile(folder / f"{replica}-lives")
    np.zeros(len(FIGURES), np.int64).tofile(folder / replica)


def numbers(path: Path) -> np.memmap[tuple[int], np.dtype[np.int64]]:
    """Numbers in a file, which outlive processes."""
    return np.memmap(path, np.int64, "r+")


class NoLog(Log):
    """Keeps nothing, so that what a process holds does not grow with every version."""

    def add(self, member: str, what: str, argument: object) -> None:
        """Nothing."""


class SharedTarget(MemoryTarget):
    """A target whose weights other processes see. A new life begins with poison."""

    def __init__(self, folder: Path, replica: str, rank: int, size: int) -> None:
        super().__init__(f"{replica}/{rank}", TINY.target(rank, size), log=NoLog())
        lives = numbers(folder / f"{replica}-lives")
        lives[rank] += 1  # before the weights of the last life go
        self._memory = shared(arena(folder, self.name), self._memory)
        self.poison()


@lru_cache(maxsize=8)
def expected(version: int, rank: int, size: int) -> dict[str, torch.Tensor]:
    """What a member holds in a version."""
    return TINY.expected(rank, size, TINY.tensors(version))


class Engine:
    """Implements `weft.contracts.ReplicaControl` for a replica, whose members it reads one after the other, layer by
    layer, as a forward pass does: between pauses only, and not when one of them has died.
    """

    def __init__(self, folder: Path, replica: str, size: int) -> None:
        self._size = size
        self._lives, self.figures = numbers(folder / f"{replica}-lives"), numbers(folder / replica)
        self._memories = [
            shared(arena(folder, f"{replica}/{rank}"), allocate(TINY.target(rank, size))) for rank in range(size)
        ]
        self._wrong = folder / "wrong"
        self._changed = threading.Condition()
        self._served: int | None = None
        self._refused = "there was no version yet"
        self._with: list[int] = []
        """Lives of the members that the version was installed in."""
        self._reading = False
        if self._get("reading"):  # the last life ended under it
            self._add("lost")
            self._set("reading", 0)

    def pause(self, mode: str, deadline: Deadline) -> None:
        """Begin no read any more, and wait for the one that runs."""
        with self._changed:
            self._served = None
            if not self._changed.wait_for(lambda: not self._reading, deadline.remaining()):
                raise DeadlineError("a pause", deadline.seconds, ["the reader"])

    def invalidate_caches(self, version: int) -> None:
        """There are none."""

    def resume(self, version: int) -> None:
        """Answer with a version."""
        with self._changed:
            self._served, self._refused, self._with = version, "", self._lives.tolist()
            self._changed.notify_all()

    def refuse(self, reason: str) -> None:
        """Refuse every read."""
        with self._changed:
            self._served, self._refused = None, reason
            self._changed.notify_all()

    def answer_for_ever(self) -> None:
        """One read after the other."""
        while True:
            self._read()

    def _read(self) -> None:
        with self._changed:
            if self._served is None and not self._refused:
                self._add("waited")
                self._changed.wait_for(lambda: self._served is not None or bool(self._refused))
            version = self._served
            broken = self._with != self._lives.tolist()
            self._reading = version is not None and not broken
            self._set("reading", int(self._reading))
        if version is None or broken:
            self._add("refused")
            time.sleep(_AGAIN_SECONDS)
            return
        found = [self._sample(memory) for memory in self._memories]
        with self._changed:
            self._reading = False
            self._changed.notify_all()
        if self._with != self._lives.tolist():
            self._add("lost")
        else:
            self._check(version, found)
        self._set("reading", 0)

    @staticmethod
    def _sample(memory: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in memory.items():
            found[name] = tensor.clone()
            time.sleep(_LAYER_SECONDS)
        return found

    def _check(self, version: int, found: list[dict[str, torch.Tensor]]) -> None:
        wrong = [
            f"{rank}: {name}"
            for rank, buffers in enumerate(found)
            for name in mismatches(buffers, expected(version, rank, self._size))
        ]
        before = self._get("version")
        if wrong:
            self._say(f"a read of version {version} found something else in {wrong}")
        if version < before:
            self._say(f"version {version} is served after {before}")
        now = time.monotonic_ns()
        if self._get("reads"):
            self._set("longest", max(self._get("longest"), now - self._get("last")))
        self._add("reads")
        self._set("last", now)
        self._set("version", version)
        if version != before:
            self._add("versions")

    def _say(self, text: str) -> None:
        with self._wrong.open("a") as stream:
            stream.write(f"{text}\n")

    def _get(self, what: str) -> int:
        return int(self.figures[FIGURES.index(what)])

    def _set(self, what: str, value: int) -> None:
        self.figures[FIGURES.index(what)] = value

    def _add(self, what: str) -> None:
        self._set(what, self._get(what) + 1)
