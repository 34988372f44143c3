"""What a plug-in of `weft.granted` brings: a network whose two ends must act together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from weft.batches import Batch
from weft.contracts import Event
from weft.deadline import Deadline
from weft.member import Member

DEPTH = 2
"""Most batches of one channel in flight; each end of it has as many staging buffers, used in turn."""


class Transfer(Protocol):
    """One batch under way at one end."""

    def poll(self) -> bool:
        """Whether it is over at this end: its bytes have left, or are in place. Raises `TransportError`."""
        ...


class Channel(Protocol):
    """One way between two members, made by both and reused for as long as they are connected. Nothing here waits.

    All of it raises `TransportError` when the network failed.
    """

    def up(self) -> bool:
        """Whether both ends have made it."""
        ...

    def send(self, batch: Batch) -> Transfer:
        """Start a batch, after those started before; the other end receives one of the same sizes."""
        ...

    def receive(self, batch: Batch) -> Transfer:
        """The same at the other end."""
        ...

    def close(self) -> None:
        """Abort what is under way and let go. Idempotent; raises nothing."""
        ...


class Network(Protocol):
    """One per endpoint."""

    @property
    def kind(self) -> str:
        """What both ends must have in common, in a word."""
        ...

    def open(self, member: Member, host: str) -> torch.device:
        """Get ready; the device whose memory it moves. `host` is the address that this member's peers reach.

        Raises `ConfigError` when this machine or the member's device cannot.
        """
        ...

    def meet(self, deadline: Deadline) -> None:
        """What all members must do together before channels are made, if anything; the first time it may wait."""
        ...

    def turn_of(self, peer: str) -> int:
        """Peers with a lower number are sent to first."""
        ...

    def reached(self) -> Event | None:
        """An event after all that the caller's current stream still does; None where there are no streams."""
        ...

    def invite(self) -> bytes:
        """What both ends of a new channel need; asked at the sending end. At most 64 KiB."""
        ...

    def channel(self, invitation: bytes, peer: str, sends: bool, ended: Callable[[], None]) -> Channel:
        """One end of it. Does not wait; `ended` may be called, from any thread, when a transfer is over."""
        ...

    def close(self) -> None:
        """Let go, after the channels. Idempotent."""
        ...
