"""NVSHMEM as a network of `weft.granted`. Unproven: never run on a GPU.

A member receives into one pair of slots: turns of one place each (`weft.turns`) make sure that only one sender writes
there. Both ends only issue to streams of their own; counters in symmetric memory order them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from weft.batches import Batch
from weft.contracts import Event
from weft.deadline import Deadline
from weft.errors import TransportError
from weft.member import Member
from weft.networks import DEPTH
from weft.stores import open_store
from weft_nvshmem import slots
from weft_nvshmem.meeting import Guest, World, meet
from weft_nvshmem.options import NvshmemOptions
from weft_nvshmem.schedule import Schedule

_END_SECONDS = 10.0
_LOG = logging.getLogger("weft.nvshmem")


class Hardware(Protocol):
    """What `weft_nvshmem.library.Library` does with NVSHMEM and CUDA, whose methods say more. Lanes are streams."""

    @property
    def packs(self) -> str: ...
    def start(self, member: Member) -> torch.device: ...
    def unique_id(self) -> bytes: ...
    def begin(self, unique_id: bytes, number: int, members: int) -> None: ...
    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]: ...
    def lane(self) -> Any: ...
    def copy(self, batch: Batch, slot: torch.Tensor, pack: bool, lane: Any) -> torch.Tensor: ...
    def put(
        self, target: torch.Tensor, source: torch.Tensor, counter: torch.Tensor, value: int, number: int, lane: Any
    ) -> None: ...
    def wait(self, counter: torch.Tensor, value: int, lane: Any) -> None: ...
    def raise_counter(self, counter: torch.Tensor, value: int, number: int, lane: Any) -> None: ...
    def mark(self, lane: Any) -> Event: ...
    def reached(self) -> Event | None: ...
    def end(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Heap:
    """This member's symmetric memory and streams."""

    world: World
    number: int
    slots: Sequence[torch.Tensor]
    """Others put here."""
    staging: Sequence[torch.Tensor]
    """Puts come from here."""
    filled: Sequence[torch.Tensor]
    """By sender: how many of its batches have come."""
    freed: Sequence[torch.Tensor]
    """By receiver: how many of this member's batches it has unpacked."""
    out: Any
    into: Any


@dataclass(frozen=True, slots=True, eq=False)
class Issued:
    """A batch at one end."""

    event: Event

    def poll(self) -> bool:
        """Whether the stream has come so far."""
        return self.event.query()


class NvshmemChannel:
    """One end of one way between two members; NVSHMEM itself needs none."""

    def __init__(self, hardware: Hardware, heap: Callable[[], Heap], peer: str) -> None:
        """`heap` is asked for with the first batch, when this member has surely joined the world."""
        self._hardware, self._heap, self._peer = hardware, heap, peer
        self._count = 0
        self._closed = False

    def up(self) -> bool:
        """True."""
        return True

    def send(self, batch: Batch) -> Issued:
        """Pack, wait for the slot, put."""
        hardware, step, heap = self._hardware, self._step(slots.put), self._heap()
        peer, filled = heap.world.number_of(self._peer), heap.filled[heap.number]
        packed = hardware.copy(batch, heap.staging[step.slot], True, heap.out)
        if step.wait:
            hardware.wait(heap.freed[peer], step.wait, heap.out)
        hardware.put(heap.slots[step.slot], packed, filled, step.signal, peer, heap.out)
        return Issued(hardware.mark(heap.out))

    def receive(self, batch: Batch) -> Issued:
        """Wait for the batch, unpack, give the slot back."""
        hardware, step, heap = self._hardware, self._step(slots.take), self._heap()
        peer, freed = heap.world.number_of(self._peer), heap.freed[heap.number]
        hardware.wait(heap.filled[peer], step.wait, heap.into)
        hardware.copy(batch, heap.slots[step.slot], False, heap.into)
        hardware.raise_counter(freed, step.signal, peer, heap.into)
        return Issued(hardware.mark(heap.into))

    def close(self) -> None:
        """Nothing can be aborted: what waits for a lost member waits for ever, in streams of its own."""
        self._closed = True

    def _step(self, which: Callable[[int], slots.Step]) -> slots.Step:
        if self._closed:
            raise TransportError("this NVSHMEM channel is closed")
        self._count += 1
        return which(self._count - 1)


class NvshmemNetwork:
    """One per process."""

    kind = "NVSHMEM"

    def __init__(self, options: NvshmemOptions, hardware: Hardware) -> None:
        self._options, self._hardware = options, hardware
        self._guest = Guest("", False, False)
        self._heap: Heap | None = None
        self._schedule = Schedule((), ())

    def open(self, member: Member, host: str) -> torch.device:
        """Import NVSHMEM, and say that this is unproven. Raises `ConfigError` where there is no GPU or no NVSHMEM."""
        device = self._hardware.start(member)
        self._guest = Guest(member.name, member.is_source, member.is_target)
        _LOG.warning(
            "transport 'nvshmem' is unproven: it never ran on a GPU. Compare what arrives. Packs %s",
            self._hardware.packs,
        )
        return device

    def meet(self, deadline: Deadline) -> None:
        """Make the world, the first time: all members do, in their first `prepare`.

        What NVSHMEM waits for cannot be interrupted: after a `DeadlineError` this process must end.
        """
        if self._heap is not None:
            return
        failed: list[Exception] = []

        def begin() -> None:
            try:
                self._begin(deadline)
            except Exception as error:  # noqa: BLE001  (raised below, in the caller's thread)
                failed.append(error)

        thread = threading.Thread(target=begin, name="weft nvshmem world", daemon=True)
        thread.start()
        deadline.wait(lambda: not thread.is_alive(), "making the NVSHMEM world", lambda: ["other members of it"])
        if failed:
            raise failed[0]

    def turn_of(self, peer: str) -> int:
        """The round in which this member puts to the peer."""
        return self._schedule.round_of(self._guest.name, peer)

    def reached(self) -> Event | None:
        """An event of the caller's current stream."""
        return self._hardware.reached()

    def invite(self) -> bytes:
        """Nothing: the world knows everybody."""
        return b""

    def channel(self, invitation: bytes, peer: str, sends: bool, ended: Callable[[], None]) -> NvshmemChannel:
        """One end of one way."""
        return NvshmemChannel(self._hardware, self._joined, peer)

    def close(self) -> None:
        """Finalise, which takes all members; when that does not end in time it is said."""
        heap, self._heap = self._heap, None
        if heap is None:
            return
        thread = threading.Thread(target=self._hardware.end, name="weft nvshmem end", daemon=True)
        thread.start()
        thread.join(_END_SECONDS)
        if thread.is_alive():
            _LOG.warning(
                "NVSHMEM waits for members that are gone: after %s s without end, end this process", _END_SECONDS
            )

    def _joined(self) -> Heap:
        if self._heap is None:
            raise TransportError("this member has not joined the NVSHMEM world")
        return self._heap

    def _begin(self, deadline: Deadline) -> None:
        options, hardware = self._options, self._hardware
        store = open_store(options.store, deadline)
        try:
            world = meet(store, options.world, self._guest, options.members, hardware.unique_id, deadline)
        finally:
            store.close()
        number, members = world.number_of(self._guest.name), len(world.guests)
        hardware.begin(world.unique_id, number, members)
        sizes = [options.slot_bytes] * (2 * DEPTH) + [members * slots.COUNTER_BYTES] * 2
        *memory, filled, freed = hardware.allocate(sizes)
        self._schedule = Schedule.of([(guest.name, guest.sends, guest.receives) for guest in world.guests])
        counters = filled.split(slots.COUNTER_BYTES), freed.split(slots.COUNTER_BYTES)
        self._heap = Heap(world, number, memory[:DEPTH], memory[DEPTH:], *counters, hardware.lane(), hardware.lane())
