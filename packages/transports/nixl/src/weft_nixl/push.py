"""The sender moves the bytes: WRITE, with a message behind the last byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft.contracts import Event, TransferProgram, Work
from weft.deadline import Deadline
from weft.endpoint import Inbox, decode, encode
from weft.errors import PeerLostError
from weft.member import Tag
from weft_nixl.lanes import Lane, Transfer
from weft_nixl.peers import Peer, Peers
from weft_nixl.transfers import Moved, NixlPrepared, moved_of, prepare


@dataclass(slots=True, eq=False)
class PushWork:
    """One posted bucket."""

    lane: Lane
    transfer: Transfer

    def poll(self) -> bool:
        """Whether every byte and the message have left; raises what prevented it, again and again."""
        with self.lane.lock:
            if not self.transfer.done:
                self.lane.advance()
            if self.transfer.error is not None:
                raise self.transfer.error.again()
            return self.transfer.done

    def cancel(self) -> None:
        """Give it up: queued chunks are never posted, active ones are aborted where the network can."""
        with self.lane.lock:
            self.lane.give_up(self.transfer, None)


class Push:
    """`weft_nixl.mover.Mover` by writes: all that is left to do at the receiver is to take in messages."""

    def __init__(self, peers: Peers, inbox: Inbox) -> None:
        self._peers, self._inbox = peers, inbox

    def prepare(self, agent: Any, program: TransferProgram, chunk_segments: int, deadline: Deadline) -> NixlPrepared:
        """Descriptor lists and handles of its sends."""
        identities = {name: self._peers.reach(name).identity for name in sorted({b.peer for b in program.sends})}
        prepared = NixlPrepared(program, moved_of(program, program.sends), {})
        prepare(agent, "WRITE", prepared, prepared.sends, identities, chunk_segments, deadline)
        return prepared

    def post(self, send: Moved, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Queue a bucket and start what fits into the depth."""
        message = encode(tag, send.bucket.index, note, send.program.key)
        lane = self._peers.reach(send.bucket.peer).lane
        send.active = True

        def ended() -> None:
            send.active = False

        transfer = Transfer(send, message, after, ended)
        lane.put(transfer)
        return PushWork(lane, transfer)

    def hear(self, identity: str, message: bytes) -> None:
        """Take in what a peer says. Raises `RecordError` for what is no message of weft."""
        self._inbox.deliver(identity, decode(message, identity))

    def advance(self) -> None:
        """Lanes do it."""

    def arrive(self, peer: Peer) -> None:
        """Its lane is all it needs."""

    def leave(self, peer: Peer, *, returns: bool) -> None:
        """Its lane fails by itself."""

    def lose(self, peer: Peer, error: PeerLostError) -> None:
        """Its lane has failed by itself."""

    def release(self, prepared: NixlPrepared) -> None:
        """Its transfers have been given up."""
