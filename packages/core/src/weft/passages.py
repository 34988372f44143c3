"""What members say to each other about buckets on their way, and the state of one that is under way at either end.

A bucket's way: the sender's `Ask`, the receiver's `Grant`, the sender's `Go`, the batches through the channel at both
ends, and for every bucket that is in place the receiver's `Arrived`. A turn that was not yet granted can be taken back
(`Withdrawn`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from weft.batches import Batch
from weft.contracts import Event
from weft.endpoint import Envelope
from weft.errors import TransportError
from weft.networks import DEPTH, Channel, Transfer
from weft.turns import Turn


class Signal(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A control message."""

    envelope: Envelope


class Invitation(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """What the receiver needs to make its end of a new channel."""

    body: bytes


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A wish for a turn, with all that it is to move."""

    number: int
    envelopes: Annotated[list[Envelope], msgspec.Meta(min_length=1)]


class Grant(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The turn may begin."""

    number: int


class Go(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The turn begins: both ends move the bytes."""

    number: int


class Withdrawn(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The turn is not wanted any more."""

    number: int


class Arrived(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Buckets of the turn are in place."""

    number: int
    count: int
    """How many of the turn's buckets, from the first."""


Said = Signal | Invitation | Ask | Grant | Go | Withdrawn | Arrived


@dataclass(eq=False)
class Post:
    """A bucket on its way out. Finished when the receiver says that all of it is in place."""

    peer: str
    envelope: Envelope
    batches: Sequence[Batch]
    after: Event | None
    done: bool = False
    error: TransportError | None = None

    def fail(self, error: TransportError) -> None:
        """It will never arrive."""
        self.error, self.done = error, True


@dataclass(eq=False)
class Passage:
    """A turn under way at one end: its batches one after another through a channel."""

    turn: Turn[Any]
    channel: Channel
    buckets: Sequence[Sequence[Batch]]
    sends: bool
    acknowledged: int = 0
    """Buckets whose arrival the receiver has said or, at the receiver, that were delivered."""
    _started: int = 0
    _finished: int = 0
    _flight: list[Transfer] = field(default_factory=list)
    _batches: Sequence[Batch] = ()

    def __post_init__(self) -> None:
        self._batches = [batch for bucket in self.buckets for batch in bucket]

    def advance(self) -> int:
        """Start and finish what can be; how many buckets are finished, from the first."""
        while True:
            while self._flight and self._flight[0].poll():
                del self._flight[0]
                self._finished += 1
            if self._started == len(self._batches) or len(self._flight) == DEPTH:
                break
            self._flight.append(self._start(self._batches[self._started]))
            self._started += 1
        total = 0
        for count, bucket in enumerate(self.buckets):
            total += len(bucket)
            if total > self._finished:
                return count
        return len(self.buckets)

    def _start(self, batch: Batch) -> Transfer:
        return self.channel.send(batch) if self.sends else self.channel.receive(batch)
