"""One endpoint of `weft.granted`: its peers, its turns, and the thread that drives them (`weft.passages`)."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from weft.batches import Batch
from weft.control import Control
from weft.endpoint import Envelope, Inbox
from weft.errors import PeerLostError, RecordError, TransportError
from weft.networks import Channel, Network
from weft.passages import Arrived, Ask, Go, Grant, Invitation, Passage, Post, Said, Signal, Withdrawn
from weft.records import decoded
from weft.turns import Incoming, Outgoing, Turn

_BUCKETS_PER_TURN = 64
_IDLE_SECONDS = 0.5
_LINGER_SECONDS = 1.0
_END_SECONDS = 5.0
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 20e-6, 1e-3


@dataclass(eq=False)
class _Peer:
    identity: str
    """Of this connection, in the inbox."""
    error: PeerLostError | None = None
    outgoing: Channel | None = None
    incoming: Channel | None = None


class Exchange:
    """Connections, channels and turns of one endpoint. Its methods may be called from any thread."""

    def __init__(
        self,
        network: Network,
        control: Control,
        places: int,
        expected: Callable[[str, Sequence[Envelope]], Sequence[Sequence[Batch]] | None],
        unwanted: Callable[[Sequence[Envelope]], bool],
    ) -> None:
        """`expected` gives the batches of what a peer wants to send, or None while its program is not prepared, and
        raises `TransportError` for what is not expected; `unwanted` whether nobody waits for it any more.
        """
        self.inbox = Inbox()
        self._network, self._control = network, control
        self._expected, self._unwanted = expected, unwanted
        self._peers: dict[str, _Peer] = {}
        self._outgoing: Outgoing[Post] = Outgoing(
            places, _BUCKETS_PER_TURN, lambda post: post.envelope.program, network.turn_of
        )
        self._incoming: Incoming[Envelope] = Incoming(places)
        self._sending: dict[str, Passage] = {}
        self._receiving: dict[str, Passage] = {}
        self._granted: dict[str, Sequence[Sequence[Batch]] | None] = {}
        self._waiting: list[Post] = []
        self._lock = threading.RLock()
        self._ending = False
        self._thread = threading.Thread(target=self._drive, name=f"weft {control.identity}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def connect(self, peer: str, identity: str, host: str, port: int, dials: bool) -> None:
        """Start meeting a peer, whose earlier connection is over."""
        with self._lock:
            self.disconnect(peer)
            self._peers[peer] = _Peer(uuid.uuid4().hex)
            self.inbox.admit(peer, self._peers[peer].identity)
            self._control.connect(peer, identity, host, port, dials)
        self._control.wake()

    def disconnect(self, peer: str) -> None:
        """Forget a peer. Idempotent."""
        with self._lock:
            known = self._peers.pop(peer, None)
            if known is not None:
                self._control.disconnect(peer)
                self._end(peer, known, PeerLostError(peer, "disconnected"))
                self.inbox.expel(peer)

    def check(self, peer: str) -> None:
        """Raise `PeerLostError` for a peer that is lost or was never connected."""
        with self._lock:
            if peer not in self._peers:
                raise PeerLostError(peer, "not connected")
            error = self._peers[peer].error
            if error is not None:
                raise error.again()

    def reaches(self, peer: str) -> bool:
        """Whether it is connected, or being connected, and not lost."""
        with self._lock:
            return peer in self._peers and self._peers[peer].error is None

    def absent(self) -> list[str]:
        """Peers that have not come and are not lost."""
        with self._lock:
            return [name for name, peer in self._peers.items() if peer.error is None and not self._control.up(name)]

    def invite(self, peer: str) -> None:
        """Make a channel to a peer, unless there is one."""
        with self._lock:
            self.check(peer)
            known = self._peers[peer]
            if known.outgoing is None:
                invitation = self._network.invite()
                known.outgoing = self._network.channel(invitation, peer, True, self._control.wake)
                self._say(peer, Invitation(invitation))
        self._control.wake()

    def unmade(self, peers: Sequence[str]) -> list[str]:
        """Of these, those to whom the channel is not yet made. Raises what broke one."""
        with self._lock:
            for name in peers:
                self.check(name)
            ends = [(name, self._peers[name].outgoing) for name in peers]
            return [name for name, channel in ends if channel is None or not channel.up()]

    def post(self, post: Post) -> None:
        """Send it once its event is reached; fails at once when the peer is lost."""
        with self._lock:
            if post.peer not in self._peers:
                raise PeerLostError(post.peer, "not connected")
            error = self._peers[post.peer].error
            if error is not None:
                post.fail(error)
            else:
                self._waiting.append(post)
        self._control.wake()

    def cancel(self, post: Post) -> None:
        """Take it back. What is under way is sent to its end."""
        with self._lock:
            if post.done or post in self._under_way(post.peer):
                return
            post.done = True
            self._waiting = [each for each in self._waiting if each is not post]
            withdrawn = self._outgoing.cancel(post.peer, post)
            if withdrawn is not None:
                self._say(post.peer, Withdrawn(withdrawn.number))
        self._control.wake()

    def signal(self, peer: str, envelope: Envelope) -> None:
        """Send it. Raises `PeerLostError`."""
        with self._lock:
            self.check(peer)
            self._say(peer, Signal(envelope))
        self._control.wake()

    def wake(self) -> None:
        """Something that `expected` looks at has changed."""
        self._control.wake()

    def close(self) -> None:
        """Let what can arrive do so, for a second; then end everything but the network."""
        linger = time.monotonic() + _LINGER_SECONDS
        while time.monotonic() < linger and self.alive and not self._parted():
            time.sleep(_LONGEST_PAUSE_SECONDS)
        self._ending = True
        self._control.wake()
        self._thread.join(_END_SECONDS)
        with self._lock:
            for name, peer in self._peers.items():
                self._end(name, peer, PeerLostError(name, "closed"))
            self._peers.clear()
            self._control.close()

    def _under_way(self, peer: str) -> Sequence[Post]:
        return self._sending[peer].turn.items if peer in self._sending else ()

    def _parted(self) -> bool:
        """Whether everybody has everything. Says nothing more to anybody once no bucket is on its way out."""
        with self._lock:
            busy = {*self._outgoing.waiting(), *(post.peer for post in self._waiting)}
            return not any(self._control.up(peer) for peer in busy) and self._control.finish()

    def _drive(self) -> None:
        pause = _SHORTEST_PAUSE_SECONDS
        while not self._ending:
            with self._lock:
                moved, busy = self._step()
            pause = _SHORTEST_PAUSE_SECONDS if moved else 2 * pause
            if moved:
                continue  # what has just ended may have made way for more
            if not busy:
                self._control.wait(_IDLE_SECONDS)
            elif pause < _LONGEST_PAUSE_SECONDS:
                time.sleep(pause)
            else:
                self._control.wait(_LONGEST_PAUSE_SECONDS)

    def _step(self) -> tuple[bool, bool]:
        """Everything that can be done now. Whether something was, and whether there is something to ask again."""
        events = self._control.step()
        for peer, said in events:
            if self.reaches(peer):  # what a peer said before it was lost is of no use
                self._guarded(peer, self._hear, said)
        ready = [post for post in self._waiting if _may_leave(post)]
        for post in ready:
            self._waiting.remove(post)
            if post.error is None:
                self._outgoing.put(post.peer, post)
        for turn in self._outgoing.asks():
            self._say(turn.peer, Ask(turn.number, [post.envelope for post in turn.items]))
        for refused in self._incoming.refuse(lambda turn: self._unwanted(turn.items)):
            self._say(refused.peer, Arrived(refused.number, len(refused.items)))
        for granted in self._incoming.grants(self._is_expected):
            self._say(granted.peer, Grant(granted.number))
        before = self._progress()
        for peer in [*self._sending]:
            self._guarded(peer, self._advance_sending)
        for peer in [*self._receiving]:
            self._guarded(peer, self._advance_receiving)
        moved = bool(events or ready) or before != self._progress()
        return moved, bool(self._sending or self._receiving or self._waiting)

    def _progress(self) -> int:
        return sum(passage.acknowledged for passage in (*self._sending.values(), *self._receiving.values()))

    def _guarded(self, peer: str, action: Callable[..., None], *arguments: Any) -> None:
        """Do something that concerns a peer; it is lost when that fails."""
        try:
            action(peer, *arguments)
        except PeerLostError as error:
            self._lose(peer, error)
        except (TransportError, RecordError, RuntimeError) as error:  # the last are torch's
            self._lose(peer, PeerLostError(peer, str(error).partition("\n")[0]))

    def _hear(self, peer: str, said: bytes | PeerLostError) -> None:
        if isinstance(said, PeerLostError):
            raise said
        what: Said = decoded(Said, said, f"{peer} sent {len(said)} bytes that mean nothing")  # type: ignore[arg-type]
        match what:
            case Signal(envelope):
                self.inbox.deliver(self._peers[peer].identity, envelope)
            case Invitation(body):
                self._peers[peer].incoming = self._network.channel(body, peer, False, self._control.wake)
            case Ask(number, envelopes):
                self._incoming.asked(peer, number, envelopes)
            case Grant(number):
                self._go(peer, self._outgoing.granted(peer, number))
            case Go(number):
                self._begin_receiving(peer, self._incoming.goes(peer, number))
            case Withdrawn(number):
                self._incoming.withdrawn(peer, number)
            case Arrived(number, count):
                self._acknowledge(peer, number, count)

    def _go(self, peer: str, turn: Turn[Post] | None) -> None:
        channel = self._peers[peer].outgoing
        if turn is not None and channel is not None:
            self._sending[peer] = Passage(turn, channel, [post.batches for post in turn.items], sends=True)
            self._say(peer, Go(turn.number))

    def _is_expected(self, turn: Turn[Envelope]) -> bool:
        try:
            self._granted[turn.peer] = self._expected(turn.peer, turn.items)
        except TransportError:
            return True  # `_begin_receiving` says so
        return self._granted[turn.peer] is not None

    def _begin_receiving(self, peer: str, turn: Turn[Envelope] | None) -> None:
        channel = self._peers[peer].incoming
        buckets = self._granted.pop(peer, None)  # as they were when it was granted: its program may be released since
        if turn is not None and buckets is None:
            buckets = self._expected(peer, turn.items)
        if turn is None or channel is None or buckets is None:
            raise TransportError(f"{peer} sends what this end has not granted")
        self._receiving[peer] = Passage(turn, channel, buckets, sends=False)

    def _advance_sending(self, peer: str) -> None:
        passage = self._sending[peer]
        finished = min(passage.advance(), passage.acknowledged)
        for post in passage.turn.items[:finished]:
            post.done = True
        if finished == len(passage.turn.items):
            del self._sending[peer]
            self._outgoing.ended(peer)

    def _advance_receiving(self, peer: str) -> None:
        passage = self._receiving[peer]
        finished = passage.advance()
        for envelope in passage.turn.items[passage.acknowledged : finished]:
            self.inbox.deliver(self._peers[peer].identity, envelope)
        if finished == len(passage.turn.items):
            del self._receiving[peer]
            self._incoming.ended(peer)
        if finished > passage.acknowledged:
            passage.acknowledged = finished
            self._say(peer, Arrived(passage.turn.number, finished))

    def _acknowledge(self, peer: str, number: int, count: int) -> None:
        turn = self._outgoing.turns.get(peer)
        if turn is None or turn.number != number:
            return
        if peer in self._sending:
            self._sending[peer].acknowledged = count
        else:  # refused: nobody waits for it any more
            for post in turn.items:
                post.done = True
            self._outgoing.ended(peer)

    def _lose(self, peer: str, error: PeerLostError) -> None:
        known = self._peers.get(peer)
        if known is not None and known.error is None:
            self._control.disconnect(peer)
            self._end(peer, known, error)
            self.inbox.lose(error)

    def _end(self, peer: str, known: _Peer, error: PeerLostError) -> None:
        """Nothing moves between this end and the peer any more."""
        if known.error is None:
            known.error = error
        self._sending.pop(peer, None)
        self._receiving.pop(peer, None)
        self._incoming.drop(peer)
        self._granted.pop(peer, None)
        mine = [post for post in self._waiting if post.peer == peer]
        self._waiting = [post for post in self._waiting if post.peer != peer]
        for post in [*self._outgoing.drop(peer), *mine]:
            if not post.done:
                post.fail(known.error)
        for channel in (known.outgoing, known.incoming):
            if channel is not None:
                channel.close()
        known.outgoing = known.incoming = None

    def _say(self, peer: str, what: Said) -> None:
        self._control.send(peer, msgspec.msgpack.encode(what))


def _may_leave(post: Post) -> bool:
    """Whether its event is reached. A post whose event is broken has failed, and need not wait either."""
    try:
        return post.after is None or post.after.query()
    except RuntimeError as error:  # torch's, of CUDA
        words = str(error).partition("\n")[0]
        post.fail(TransportError(f"the event that bucket {post.envelope.bucket} waited for is broken: {words}"))
        return True
