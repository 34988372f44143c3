"""What `weft_nixl.transport` asks of either way to move buckets: `weft_nixl.push`, `weft_nixl.pull`."""

from __future__ import annotations

from typing import Any, Protocol

from weft.contracts import Event, TransferProgram, Work
from weft.deadline import Deadline
from weft.errors import PeerLostError
from weft.member import Tag
from weft_nixl.peers import Peer
from weft_nixl.transfers import Moved, NixlPrepared


class Mover(Protocol):
    """One of the two ways to move buckets (`NixlOptions.direction`). Its caller holds the lock."""

    def prepare(self, agent: Any, program: TransferProgram, chunk_segments: int, deadline: Deadline) -> NixlPrepared:
        """Descriptor lists and handles at the end that moves the bytes. Raises `PeerLostError` for a peer of it that
        is not connected.
        """
        ...

    def post(self, send: Moved, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Begin to send a bucket that is not active."""
        ...

    def hear(self, identity: str, message: bytes) -> None:
        """Take in what an agent says, known or not. Raises `RecordError` for what is no message of weft."""
        ...

    def advance(self) -> None:
        """Do what lanes do not do by themselves."""
        ...

    def arrive(self, peer: Peer) -> None:
        """A peer is connected."""
        ...

    def leave(self, peer: Peer, *, returns: bool) -> None:
        """A peer will be left now, and perhaps connected again as the same agent."""
        ...

    def lose(self, peer: Peer, error: PeerLostError) -> None:
        """A peer is lost."""
        ...

    def release(self, prepared: NixlPrepared) -> None:
        """A program is not used any more; its transfers have been given up."""
        ...
