"""What a plug-in of `weft.granted` brings: a network whose two ends must act together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from weft.contracts import Event
from weft.member import Member


class Transfer(Protocol):
    """One batch under way at one end."""

    def poll(self) -> bool:
        """Whether it is over, `then` included. Raises `TransportError` when it failed."""
        ...


class Channel(Protocol):
    """One way between two members, made by both and reused for as long as they are connected. Nothing here waits.

    All of it raises `TransportError` when the network failed.
    """

    def up(self) -> bool:
        """Whether both ends have made it."""
        ...

    def staging(self, index: int) -> torch.Tensor:
        """Staging buffer `index`, below `weft.exchange.DEPTH`, of this end: uint8, `Limits.staging_bytes` long."""
        ...

    def ordered(self) -> AbstractContextManager[Any]:
        """Copies inside come after earlier transfers of this end and before later ones."""
        ...

    def send(self, tensors: Sequence[torch.Tensor]) -> Transfer:
        """Start a batch; the other end receives tensors of the same sizes."""
        ...

    def receive(self, tensors: Sequence[torch.Tensor], then: Callable[[], None]) -> Transfer:
        """Start a batch, and do `then`, as if in `ordered`, once its bytes are there."""
        ...

    def close(self) -> None:
        """Abort what is under way and let go. Idempotent; raises nothing."""
        ...


class Network(Protocol):
    """One per endpoint."""

    def open(self, member: Member, host: str) -> torch.device:
        """Get ready; the device whose memory it moves. `host` is the address that this member's peers reach.

        Raises `ConfigError` when this machine or the member's device cannot.
        """
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
