"""A stand-in for NCCL's communicators where there is no GPU: two-member process groups of torch's gloo, on CPU memory.

gloo's work objects cannot be asked whether they are finished, only waited for; hence a thread per channel.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from weft.batches import Batch
from weft.contracts import Event
from weft.deadline import Deadline
from weft.errors import TransportError
from weft.member import Member
from weft.networks import DEPTH
from weft.records import decoded

# torch's own annotations leave these out.
_dist: Any = dist
PrefixStore, ProcessGroupGloo, TCPStore = _dist.PrefixStore, _dist.ProcessGroupGloo, _dist.TCPStore

_TAG, _WAKE_TAG = 0, 1
_MEET = timedelta(seconds=30)
_UNTIL_CLOSED = timedelta(days=30)
_END_SECONDS = 5.0


class Invitation(msgspec.Struct, frozen=True, array_like=True):
    """Where the two ends of a channel meet: a store at the sending end, and their keys in it."""

    host: str
    port: int
    prefix: str


@dataclass(eq=False)
class GlooTransfer:
    """One batch at one end."""

    tensors: Sequence[torch.Tensor]
    then: Callable[[], None]
    channel: GlooChannel
    done: bool = False

    def poll(self) -> bool:
        """Whether the channel's thread is through with it."""
        return self.channel.check() and self.done


class GlooChannel:
    """One end; rank 0 sends and rank 1 receives."""

    def __init__(
        self, invitation: Invitation, peer: str, sends: bool, staging_bytes: int, ended: Callable[[], None]
    ) -> None:
        self._peer, self._sends, self._ended = peer, sends, ended
        self._staging = itertools.cycle([torch.empty(staging_bytes, dtype=torch.uint8) for _ in range(DEPTH)])
        self._error = ""
        self._group: Any | None = None
        self._closing = False
        self._transfers: queue.SimpleQueue[GlooTransfer | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, args=(invitation,), name=f"weft gloo {peer}", daemon=True)
        self.thread.start()

    def check(self) -> bool:
        """True. Raises `TransportError` when the channel is broken."""
        if self._error:
            raise TransportError(f"channel with {self._peer}: {self._error}")
        return True

    def up(self) -> bool:
        """Whether both ends have met."""
        return self.check() and self._group is not None

    def send(self, batch: Batch) -> GlooTransfer:
        """Pack it, and queue it for the thread."""
        return self._queue(batch.gather(next(self._staging)), lambda: None)

    def receive(self, batch: Batch) -> GlooTransfer:
        """Queue it for the thread, which unpacks it too."""
        staging = next(self._staging)
        return self._queue(batch.through(staging), lambda: batch.scatter(staging))

    def _queue(self, tensors: Sequence[torch.Tensor], then: Callable[[], None]) -> GlooTransfer:
        transfer = GlooTransfer(tensors, then, self)
        self._transfers.put(transfer)
        return transfer

    def close(self) -> None:
        """End the thread, which may take a moment to notice."""
        self._closing = True
        self._error = self._error or "closed"
        self._transfers.put(None)
        if self._group is not None:
            # A wait that times out closes gloo's sockets, which ends every other wait: the only way to interrupt one.
            never = torch.empty(1, dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):
                self._group.recv([never], int(self._sends), _WAKE_TAG).wait(timedelta(milliseconds=1))

    def _run(self, invitation: Invitation) -> None:
        try:
            store = TCPStore(invitation.host, invitation.port, is_master=False, wait_for_workers=False, timeout=_MEET)
            rank = 0 if self._sends else 1
            self._group = ProcessGroupGloo(PrefixStore(invitation.prefix, store), rank, 2, _MEET)
            self._ended()
            while not self._closing and (transfer := self._transfers.get()) is not None:
                move = self._group.send if self._sends else self._group.recv
                for work in [move([tensor], 1 - rank, _TAG) for tensor in transfer.tensors]:
                    work.wait(_UNTIL_CLOSED)
                transfer.then()
                transfer.done = True
                self._ended()
        except RuntimeError as error:
            self._error = self._error or str(error).partition("\n")[0]
            self._ended()


class GlooNetwork:
    """What `backend="gloo"` moves bytes with."""

    kind = "gloo"

    def __init__(self, staging_bytes: int) -> None:
        self._staging_bytes = staging_bytes
        self._host = ""
        self._store: Any = None
        self._channels: list[GlooChannel] = []

    def open(self, member: Member, host: str) -> torch.device:
        """Host a store, in which the ends of channels that this member sends through meet."""
        self._host = host
        try:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise TransportError(f"transport 'nccl' of {member.name} cannot listen on {host}: {error}") from error
        return torch.device("cpu")

    def meet(self, deadline: Deadline) -> None:
        """Nothing: channels need no world."""

    def turn_of(self, peer: str) -> int:
        """All alike: who waits longest is next."""
        return 0

    def reached(self) -> Event | None:
        """None: the CPU has no streams."""
        return None

    def invite(self) -> bytes:
        """An `Invitation`."""
        return msgspec.msgpack.encode(Invitation(self._host, self._store.port, uuid.uuid4().hex))

    def channel(self, invitation: bytes, peer: str, sends: bool, ended: Callable[[], None]) -> GlooChannel:
        """One end of a channel."""
        where = decoded(Invitation, invitation, f"{peer} sent an invitation that is none")
        channel = GlooChannel(where, peer, sends, self._staging_bytes, ended)
        self._channels = [*(each for each in self._channels if each.thread.is_alive()), channel]
        return channel

    def close(self) -> None:
        """Wait for the channels' threads, and end the store."""
        for channel in self._channels:
            channel.close()
            channel.thread.join(_END_SECONDS)
        self._channels = []
        self._store = None
