"""NCCL as a network of `weft.granted`: non-blocking communicators of two, driven by asking for their state.

Not torch's `ProcessGroupNCCL`: grouping has only private names there, and its watchdog ends the process when a peer is
lost. Communicators of two need no world, so that members of different `torch.distributed` jobs meet.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from weft.batches import Batch
from weft.contracts import Event
from weft.deadline import Deadline
from weft.errors import ConfigError, TransportError
from weft.member import Member
from weft.networks import DEPTH
from weft_nccl.library import Library, load

_END_SECONDS = 5.0
_SENDER, _RECEIVER = 0, 1


class Lane(Protocol):
    """A stream of a device: what a communicator's operations are issued to."""

    @property
    def handle(self) -> int:
        """The `cudaStream_t`."""
        ...

    def within(self) -> AbstractContextManager[Any]:
        """Make it, and its device, current."""
        ...

    def mark(self) -> Event:
        """An event after all that was issued to it so far."""
        ...


class CudaLane:
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @property
    def handle(self) -> int:
        """The `cudaStream_t`."""
        return int(self._stream.cuda_stream)

    def within(self) -> AbstractContextManager[Any]:
        """Make it, and its device, current."""
        return torch.cuda.stream(self._stream)

    def mark(self) -> Event:
        """An event after all that was issued to it so far."""
        event: Event = self._stream.record_event()
        return event


@dataclass(eq=False)
class NcclTransfer:
    """One batch at one end: waits for the communicator, is issued as one group, and ends with an event."""

    channel: NcclChannel
    tensors: Sequence[torch.Tensor]
    then: Callable[[], None]
    event: Event | None = None

    def poll(self) -> bool:
        """Whether its event is reached."""
        self.channel.pump()
        return self.event is not None and self.event.query()


class NcclChannel:
    """One end of a communicator of two; rank 0 sends and rank 1 receives."""

    def __init__(
        self,
        library: Library,
        unique_id: bytes,
        peer: str,
        sends: bool,
        lane: Lane,
        staging: Sequence[torch.Tensor],
        blocks: int,
    ) -> None:
        self._library, self._peer, self._sends, self._lane = library, peer, sends, lane
        self._staging = itertools.cycle(staging)
        self._waiting: deque[NcclTransfer] = deque()
        self._issued: NcclTransfer | None = None
        self.abort: threading.Thread | None = None
        with lane.within():
            self._handle = library.begin(unique_id, 2, _SENDER if sends else _RECEIVER, blocks)

    def up(self) -> bool:
        """Whether both ends have come."""
        return self._settled()

    def send(self, batch: Batch) -> NcclTransfer:
        """Pack it now, and issue its group as soon as the communicator has taken the one before."""
        with self._lane.within():
            tensors = batch.gather(next(self._staging))
        return self._queue(tensors, lambda: None)

    def receive(self, batch: Batch) -> NcclTransfer:
        """Issue its group as soon as the communicator has taken the one before, and then unpack it."""
        staging = next(self._staging)
        return self._queue(batch.through(staging), lambda: batch.scatter(staging))

    def _queue(self, tensors: Sequence[torch.Tensor], then: Callable[[], None]) -> NcclTransfer:
        transfer = NcclTransfer(self, tensors, then)
        self._waiting.append(transfer)
        self.pump()
        return transfer

    def pump(self) -> None:
        """Finish what the communicator has taken and issue what waits: one group at a time may be in its hands."""
        while (self._issued or self._waiting) and self._settled():
            with self._lane.within():
                if self._issued is not None:
                    self._issued.then()
                    self._issued.event = self._lane.mark()
                    self._issued = None
                if self._waiting:
                    self._issued = self._waiting.popleft()
                    self._issue(self._issued.tensors)

    def close(self) -> None:
        """Abort it in a thread of its own, so that nobody waits for NCCL."""
        if self.abort is None:
            self._waiting.clear()
            self.abort = threading.Thread(target=self._abort, name=f"weft nccl {self._peer}", daemon=True)
            self.abort.start()

    def ended(self) -> bool:
        """Whether it was closed and NCCL has let go of it."""
        return self.abort is not None and not self.abort.is_alive()

    def _settled(self) -> bool:
        if self.abort is not None:
            raise TransportError(f"channel with {self._peer}: closed")
        fault = self._library.fault(self._handle)
        if fault:
            raise TransportError(f"channel with {self._peer}: {fault}")
        return self._library.settled(self._handle)

    def _issue(self, tensors: Sequence[torch.Tensor]) -> None:
        move = self._library.send if self._sends else self._library.receive
        peer = _RECEIVER if self._sends else _SENDER
        with self._library.group():
            for tensor in tensors:
                move(self._handle, tensor.data_ptr(), tensor.numel(), peer, self._lane.handle)

    def _abort(self) -> None:
        with self._lane.within():
            self._library.abort(self._handle)


class NcclNetwork:
    """What `backend="nccl"` moves bytes with."""

    kind = "NCCL"

    def __init__(self, library: str, staging_bytes: int, blocks: int, most_channels: int) -> None:
        """`blocks` is how many thread blocks a channel takes, `most_channels` how many may move bytes at one time."""
        self._name, self._staging_bytes = library, staging_bytes
        self._blocks, self._most_channels = blocks, most_channels
        self._library: Library | None = None
        self._device = torch.device("cpu")
        self._channels: list[NcclChannel] = []

    def open(self, member: Member, host: str) -> torch.device:
        """Load NCCL. Raises `ConfigError` where there is no GPU, no NCCL, or one that is too old."""
        self._device = torch.device(member.device)
        if self._device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError(
                f"transport 'nccl' of {member.name}: NCCL moves GPU memory, this member's device is {member.device} "
                f"and torch finds {torch.cuda.device_count()} GPUs here; use transport 'gloo' or 'nixl'"
            )
        self.check_room(torch.cuda.get_device_properties(self._device).multi_processor_count)
        self._library = load(self._name)
        return self._device

    def check_room(self, room: int) -> None:
        """Raise `ConfigError` when channels could wait for each other on a GPU of so many multiprocessors.

        A channel's kernel waits on the GPU for that of its peer: one that finds no room there holds both.
        """
        asked = self._blocks * self._most_channels
        if asked > room:
            raise ConfigError(
                f"{self._most_channels} channels (peers_at_once, both ways) of {self._blocks} blocks may need {asked} "
                f"multiprocessors at once, this GPU has {room}: lower either option"
            )

    def meet(self, deadline: Deadline) -> None:
        """Nothing: communicators of two need no world."""

    def turn_of(self, peer: str) -> int:
        """All alike: who waits longest is next."""
        return 0

    def reached(self) -> Event | None:
        """An event of the caller's current stream."""
        event: Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def invite(self) -> bytes:
        """NCCL's unique id."""
        return self._loaded().unique_id()

    def channel(self, invitation: bytes, peer: str, sends: bool, ended: Callable[[], None]) -> NcclChannel:
        """One end of a communicator."""
        lane = CudaLane(self._device)
        with lane.within():
            staging = [torch.empty(self._staging_bytes, dtype=torch.uint8, device=self._device) for _ in range(DEPTH)]
        channel = NcclChannel(self._loaded(), invitation, peer, sends, lane, staging, self._blocks)
        self._channels = [*(each for each in self._channels if not each.ended()), channel]
        return channel

    def close(self) -> None:
        """Abort all communicators, and give them a moment."""
        for channel in self._channels:
            channel.close()
        for channel in self._channels:
            if channel.abort is not None:
                channel.abort.join(_END_SECONDS)
        self._channels = []

    def _loaded(self) -> Library:
        if self._library is None:
            raise TransportError("transport 'nccl' is not open yet")
        return self._library
