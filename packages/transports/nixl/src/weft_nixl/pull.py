"""The receiver moves the bytes: READ, after the sender has said that they are ready.

A bucket's way: the sender's `Ready`, with tag and note; the receiver's READ; its `Finished`, upon which the sender's
work is done; the sender's `Settled`, upon which the receiver delivers the message.

`Settled` is there for a sender that gives up (`cancel`), whose bytes may change from then on, in the midst of the READ:
it says that what was read is not wanted, and nothing of it is delivered, however late the receiver learns of it. So a
message that is delivered is never a mixture, and it takes its place among the sender's other messages.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from dataclasses import dataclass
from typing import Any

import msgspec

from weft.contracts import Event, TransferProgram, Work
from weft.deadline import Deadline
from weft.endpoint import EARLY_LIMIT, Envelope, Inbox, Programs, decode, encode
from weft.errors import PeerLostError, RecordError, TransportError
from weft.member import Tag
from weft.records import decoded
from weft_nixl.lanes import Transfer
from weft_nixl.peers import Peer, Peers
from weft_nixl.transfers import Moved, NixlPrepared, moved_of, prepare

_MARK = b"~"
"""Begins what is said about a bucket; signals begin otherwise."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The sender's: the bytes of a bucket may be read."""

    number: int
    """Of the post, unique to the sender's endpoint."""
    envelope: Envelope


class Finished(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The receiver's: nothing is read any more, so the bytes may change."""

    number: int
    error: str = ""
    """Why they were not read, where that is the sender's to know."""


class Settled(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The sender's: what came of a post."""

    number: int
    wanted: bool
    """Whether the bytes that were read are what was posted. If not, they are to be dropped."""


Said = Ready | Finished | Settled


@dataclass(slots=True, eq=False)
class PullWork:
    """One posted bucket."""

    pull: Pull
    lock: threading.RLock
    number: int
    send: Moved
    envelope: Envelope
    after: Event | None
    ready: bool = False
    """Whether the receiver was told."""
    done: bool = False
    error: TransportError | None = None

    def poll(self) -> bool:
        """Whether the receiver has read every byte; raises what prevented it, again and again."""
        with self.lock:
            self.pull.offer(self)
            if self.error is not None:
                raise self.error.again()
            return self.done

    def cancel(self) -> None:
        """Give it up. Its bytes may change at once: what the receiver may still read of them is not delivered."""
        with self.lock:
            self.pull.withdraw(self)


@dataclass(slots=True, eq=False)
class _Reading:
    """What a sender has offered."""

    identity: str
    number: int
    envelope: Envelope
    transfer: Transfer | None = None
    """None until its program is prepared here."""
    refused: bool = False
    """Whether nobody here wants it any more."""

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return self.transfer is not None and self.transfer.done and not self.transfer.given_up


class Pull:
    """`weft_nixl.mover.Mover` by reads. Its caller holds the lock."""

    def __init__(self, peers: Peers, inbox: Inbox, lock: threading.RLock) -> None:
        self._peers, self._inbox, self._lock = peers, inbox, lock
        self._numbers = itertools.count()
        self._works: dict[int, PullWork] = {}
        self._programs: Programs[NixlPrepared] = Programs()
        self._readings: dict[tuple[str, int], _Reading] = {}
        self._retired: set[str] = set()
        """Agents that are not heard any more: others have taken their place, or this end has left them."""

    def prepare(self, agent: Any, program: TransferProgram, chunk_segments: int, deadline: Deadline) -> NixlPrepared:
        """Descriptor lists and handles of its receives; what was offered before is read from now on."""
        identities = {name: self._peers.reach(name).identity for name in sorted({b.peer for b in program.receives})}
        prepared = NixlPrepared(program, moved_of(program, program.sends), moved_of(program, program.receives))
        prepare(agent, "READ", prepared, prepared.receives, identities, chunk_segments, deadline)
        self._programs.add(program.key, prepared)
        self._begin_waiting()
        return prepared

    def post(self, send: Moved, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Offer a bucket to its receiver, as soon as `after` is reached."""
        encode(tag, send.bucket.index, note)  # refuses a note that is too long
        self._peers.reach(send.bucket.peer)
        envelope = Envelope(tag, send.bucket.index, note, send.program.key)
        work = PullWork(self, self._lock, next(self._numbers), send, envelope, after)
        send.active = True
        self._works[work.number] = work
        self.offer(work)
        return work

    def offer(self, work: PullWork) -> None:
        """Tell the receiver that it may read, unless it was told or must wait."""
        if work.ready or work.done or not (work.after is None or work.after.query()):
            return
        work.ready = True
        try:
            self._say(work.send.bucket.peer, Ready(work.number, work.envelope))
        except TransportError as error:
            self._end(work, error)

    def withdraw(self, work: PullWork) -> None:
        """Nobody wants it any more at this end."""
        if not work.done:
            self._end(work, None)
            if work.ready:
                self._try_to_say(work.send.bucket.peer, Settled(work.number, wanted=False))

    def _end(self, work: PullWork, error: TransportError | None) -> None:
        if not work.done:
            work.done, work.error, work.send.active = True, error, False
            del self._works[work.number]

    def advance(self) -> None:
        """Offer what waits for its event; lanes do the rest."""
        for work in list(self._works.values()):
            self.offer(work)

    def hear(self, identity: str, message: bytes) -> None:
        """Take in what a peer says. Raises `RecordError` for what is no message of weft, or comes out of turn."""
        if not message.startswith(_MARK):
            self._inbox.deliver(identity, decode(message, identity))
            return
        said: Said = decoded(
            Said,  # type: ignore[arg-type]
            message[len(_MARK) :],
            f"{identity} sent {len(message)} bytes that are not a message of weft",
        )
        match said:
            case Ready(number, envelope):
                self._hear_ready(_Reading(identity, number, envelope))
            case Settled(number, wanted):
                self._hear_settled(identity, number, wanted=wanted)
            case Finished(number, error):
                self._hear_finished(identity, number, error)

    def _hear_ready(self, reading: _Reading) -> None:
        if reading.identity in self._retired:
            return
        if len(self._readings) >= EARLY_LIMIT * (1 + len(self._peers.everybody())):
            raise TransportError(f"{reading.identity} offers more than {EARLY_LIMIT} buckets at a time")
        self._readings[reading.identity, reading.number] = reading
        self._begin(reading)

    def _hear_settled(self, identity: str, number: int, *, wanted: bool) -> None:
        reading = self._readings.get((identity, number))
        if reading is None:
            return
        if not wanted:
            self._refuse(reading)
        elif not reading.complete:
            raise RecordError(f"{identity} settles bucket {reading.envelope.bucket}, which has not been read yet")
        else:
            self._forget(reading)
            self._inbox.deliver(identity, reading.envelope)

    def _hear_finished(self, identity: str, number: int, fault: str) -> None:
        work, peer = self._works.get(number), self._peers.named(identity)
        if peer is None:
            return
        if work is None or work.send.bucket.peer != peer.name:
            self._try_to_say(peer.name, Settled(number, wanted=False))
        elif fault:
            self._end(work, TransportError(f"{work.send.what}: {peer.name} has not read it: {fault}"))
        else:
            self._try_to_say(peer.name, Settled(number, wanted=True))
            self._end(work, None)  # unless the peer was found lost, and it with the peer

    def _begin_waiting(self) -> None:
        for reading in [each for each in self._readings.values() if each.transfer is None]:
            self._begin(reading)

    def _begin(self, reading: _Reading) -> None:
        """Read it, if its program is prepared; refuse it, if nobody waits for it."""
        key, index = reading.envelope.program, reading.envelope.bucket
        peer, prepared = self._peers.named(reading.identity), self._programs.made(key)
        if peer is None:
            return
        if prepared is None:
            if self._programs.released(key):
                self._forget(reading)
                self._try_to_say(peer.name, Finished(reading.number))
            return
        moved = prepared.receives.get(index) if index is not None else None
        if moved is not None and moved.bucket.peer == peer.name:
            reading.transfer = Transfer(moved, ended=lambda: self._read(reading))
            peer.lane.put(reading.transfer)
        elif not any((each.index, each.peer) == (index, peer.name) for each in prepared.program.receives):
            self._forget(reading)
            self._try_to_say(peer.name, Finished(reading.number, f"bucket {index} is none of its receives"))
        # else the peer has connected anew, and its program will be prepared again

    def _read(self, reading: _Reading) -> None:
        """Its transfer has ended, one way or another."""
        transfer = reading.transfer
        assert transfer is not None, "it was begun"
        if not reading.complete or reading.refused:
            self._forget(reading)
        peer = self._peers.named(reading.identity)
        if peer is not None and not reading.refused:
            self._try_to_say(peer.name, Finished(reading.number, str(transfer.error or "")))

    def _refuse(self, reading: _Reading) -> None:
        """Deliver nothing of it; what is in flight ends by itself."""
        reading.refused = True
        peer = self._peers.named(reading.identity)
        if reading.transfer is not None and not reading.transfer.done and peer is not None:
            peer.lane.give_up(reading.transfer, None)
        if reading.transfer is None or reading.transfer.done:
            self._forget(reading)

    def _forget(self, reading: _Reading) -> None:
        self._readings.pop((reading.identity, reading.number), None)

    def lose(self, peer: Peer, error: PeerLostError) -> None:
        """Neither end's posts come to anything; its lane has failed."""
        for work in [each for each in self._works.values() if each.send.bucket.peer == peer.name]:
            self._end(work, error)
        for reading in [each for each in self._readings.values() if each.identity == peer.identity]:
            self._refuse(reading)

    def leave(self, peer: Peer, *, returns: bool) -> None:
        """Before it is left: tell it what becomes of its posts and of those to it. Those that nothing was read of, or
        everything, stand when it `returns` as the same agent.
        """
        for work in [each for each in self._works.values() if each.send.bucket.peer == peer.name]:
            self.withdraw(work)
            work.error = PeerLostError(peer.name, "disconnected")
        for reading in [each for each in self._readings.values() if each.identity == peer.identity]:
            if not (returns and (reading.transfer is None or reading.complete)):
                self._try_to_say(peer.name, Finished(reading.number, "its receiver has disconnected"))
                self._refuse(reading)
        if not returns:
            self._retired.add(peer.identity)

    def arrive(self, peer: Peer) -> None:
        """It is connected."""
        self._retired.discard(peer.identity)
        self._begin_waiting()

    def release(self, prepared: NixlPrepared) -> None:
        """Withdraw what is posted of it, and refuse what is offered for it."""
        for work in [each for each in self._works.values() if prepared.sends.get(each.send.bucket.index) is each.send]:
            self.withdraw(work)
        if self._programs.release(prepared.program.key, prepared, keep=False):
            self._begin_waiting()

    def _say(self, peer: str, said: Said) -> None:
        self._peers.notify(peer, _MARK + msgspec.msgpack.encode(said))

    def _try_to_say(self, peer: str, said: Said) -> None:
        """To a peer that is lost or being lost there is nothing to say."""
        with contextlib.suppress(PeerLostError):
            self._say(peer, said)
