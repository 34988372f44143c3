"""NVSHMEM and CUDA streams emulated in one process: symmetric memory by lists, streams by threads that run late."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import torch

from weft.batches import Batch
from weft.contracts import Event
from weft.member import Member


@dataclass(eq=False)
class Done:
    """An event."""

    reached: threading.Event = field(default_factory=threading.Event)

    def query(self) -> bool:
        return self.reached.is_set()

    def synchronize(self) -> None:
        raise AssertionError("a transport must not block on an event")


class Lane:
    """A stream: does what it is given in order, each thing a little later."""

    def __init__(self, seed: int) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._random = Random(seed)
        threading.Thread(target=self._run, daemon=True).start()

    def issue(self, what: Callable[[], None] | None) -> None:
        self._work.put(what)

    def _run(self) -> None:
        while (what := self._work.get()) is not None:
            time.sleep(self._random.random() * 2e-3)
            what()


@dataclass
class Emulation:
    """What all members of a world share."""

    members: int
    barrier: threading.Barrier = field(init=False)
    memory: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """By member: its symmetric memory, in the order of allocation."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    ended: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Bytes of every put."""

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.members, timeout=60)

    def same_place(self, mine: torch.Tensor, owner: int, other: int) -> torch.Tensor:
        """The part of `other`'s memory that is where `mine` is in `owner`'s."""
        for index, whole in enumerate(self.memory[owner]):
            offset = mine.data_ptr() - whole.data_ptr()
            if 0 <= offset < whole.numel():
                return self.memory[other][index][offset : offset + mine.numel()]
        raise AssertionError("not symmetric memory")


class EmulatedHardware:
    """`weft_nvshmem.network.Hardware` of one member."""

    packs = "in an emulation"

    def __init__(self, shared: Emulation) -> None:
        self._shared = shared
        self._number = -1
        self._lanes: list[Lane] = []

    def start(self, member: Member) -> torch.device:
        return torch.device("cpu")

    def unique_id(self) -> bytes:
        return b"id"

    def begin(self, unique_id: bytes, number: int, members: int) -> None:
        assert (unique_id, members) == (b"id", self._shared.members)
        self._number = number
        self._shared.barrier.wait()

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        made = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self._shared.memory[self._number] = made
        self._shared.barrier.wait()
        return made

    def lane(self) -> Lane:
        self._lanes.append(Lane(len(self._lanes) + 10 * self._number))
        return self._lanes[-1]

    def copy(self, batch: Batch, slot: torch.Tensor, pack: bool, lane: Lane) -> torch.Tensor:
        assert not batch.direct
        lane.issue(lambda: (batch.gather if pack else batch.scatter)(slot) and None)
        return batch.through(slot)[0]

    def put(
        self, target: torch.Tensor, source: torch.Tensor, counter: torch.Tensor, value: int, number: int, lane: Lane
    ) -> None:
        def act() -> None:
            self._shared.sizes.append(source.numel())
            self._shared.same_place(target[: source.numel()], self._number, number).copy_(source)

        lane.issue(act)
        self.raise_counter(counter, value, number, lane)

    def wait(self, counter: torch.Tensor, value: int, lane: Lane) -> None:
        def act() -> None:
            with self._shared.changed:
                assert self._shared.changed.wait_for(lambda: int(counter.view(torch.int64)) >= value, 60)

        lane.issue(act)

    def raise_counter(self, counter: torch.Tensor, value: int, number: int, lane: Lane) -> None:
        def act() -> None:
            with self._shared.changed:
                self._shared.same_place(counter, self._number, number).view(torch.int64).fill_(value)
                self._shared.changed.notify_all()

        lane.issue(act)

    def mark(self, lane: Lane) -> Event:
        done = Done()
        lane.issue(done.reached.set)
        return done

    def reached(self) -> Event | None:
        return None

    def end(self) -> None:
        for lane in self._lanes:
            lane.issue(None)
        self._shared.ended.append(self._number)
