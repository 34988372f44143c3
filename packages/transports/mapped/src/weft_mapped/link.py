"""Who the other processes are: connections, gates, lives, and the thread that listens."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from weft.contracts import Message
from weft.control import Control
from weft.endpoint import Envelope, Inbox
from weft.errors import PeerLostError, TransportError
from weft.records import decoder_of
from weft_mapped.gate import Gate, Invitation
from weft_mapped.kernel import Life
from weft_mapped.places import Place

_IDLE_SECONDS = 0.5
_LINGER_SECONDS = 1.0
_POLL_SECONDS = 1e-3
_END_SECONDS = 5.0
_PLACES_PER_MESSAGE = 1000
"""Below the longest message of a control connection, with handles of CUDA memory."""


class Invited(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The peer may write here, through this gate."""

    gate: Invitation


class Told(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Regions that are registered here, in addition to those told before."""

    places: list[Place]
    registered: int
    """Of how many registrations, from the first, all is told."""


class Announced(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A bucket is in place, or a signal."""

    envelope: Envelope


Said = Invited | Told | Announced


@dataclass(eq=False)
class Peer:
    """Another endpoint."""

    name: str
    endpoint: str
    """Its identity."""
    registered: int
    """How many registrations it had when its address was given."""
    life: Life
    gate: Gate
    """What it may write here."""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of this connection, in the inbox."""
    error: PeerLostError | None = None
    invitation: Invitation | None = None
    """What this endpoint may write there."""
    places: dict[tuple[str, int, int], Place] = field(default_factory=dict)
    """Its regions, by device, address and size; the newest registration of each."""
    told: int = 0
    """Of how many registrations it has told all."""

    @property
    def ready(self) -> bool:
        """Whether it may be written, and has told where."""
        return self.invitation is not None and self.told >= self.registered


class Link:
    """Connections of one endpoint. Its methods may be called from any thread."""

    def __init__(
        self, control: Control, state: threading.Condition, ended: Callable[[str, PeerLostError], None]
    ) -> None:
        """`state` guards everything here, and is held when `ended` is called: nothing moves to that peer any more."""
        self.inbox = Inbox()
        self._control, self._state, self._ended = control, state, ended
        self._peers: dict[str, Peer] = {}
        self._ending = False
        self._decoder: msgspec.msgpack.Decoder[Said] = decoder_of(Said)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._drive, name=f"weft-mapped {control.identity}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def peers(self) -> list[Peer]:
        """Those connected, lost ones included."""
        return list(self._peers.values())

    def connect(self, peer: Peer, identity: str, host: str, port: int, dials: bool) -> None:
        """Start meeting a peer, whose earlier connection is over, and invite it."""
        with self._state:
            self.disconnect(peer.name)
            self._peers[peer.name] = peer
            self.inbox.admit(peer.name, peer.identity)
            self._control.connect(peer.name, identity, host, port, dials)
            self._say(peer.name, Invited(peer.gate.invitation))
        self._control.wake()  # so that its thread listens to the new socket

    def tell(self, peer: Peer, places: Sequence[Place], registered: int) -> None:
        """Tell a peer of regions: the last of so many registrations."""
        with self._state:
            for at in range(0, len(places), _PLACES_PER_MESSAGE):
                self._say(peer.name, Told(list(places[at : at + _PLACES_PER_MESSAGE]), 0))
            self._say(peer.name, Told([], registered))

    def disconnect(self, name: str) -> None:
        """Forget a peer. Nothing is written here by it once this returns. Idempotent."""
        with self._state:
            peer = self._peers.pop(name, None)
            if peer is None:
                return
            self._control.disconnect(name)
            self._ended(name, PeerLostError(name, "disconnected"))
            self.inbox.expel(name)
        peer.gate.remove()

    def reach(self, name: str) -> Peer:
        """A peer that is connected. Raises `PeerLostError`."""
        with self._state:
            peer = self._peers.get(name)
            if peer is None:
                raise PeerLostError(name, "not connected")
            if peer.error is not None:
                raise peer.error.again()
            return peer

    def known(self, name: str) -> Peer | None:
        """A peer, lost or not."""
        return self._peers.get(name)

    def announce(self, name: str, envelope: Envelope) -> None:
        """Send a message; nothing happens for a peer that is gone."""
        with self._state:
            self._say(name, Announced(envelope))

    def lose(self, error: PeerLostError) -> None:
        """A peer is gone: what was posted to it fails, and the next `poll` says so."""
        with self._state:
            peer = self._peers.get(error.peer)
            if peer is not None and peer.error is None:
                peer.error = error
                peer.gate.shut()
                self._control.disconnect(peer.name)
                self._ended(peer.name, error)
                self.inbox.lose(error)

    def close(self, busy: Callable[[], bool]) -> None:
        """Let what can leave do so, for a second; then end everything. Raises `TransportError` as `Gate.shut`."""
        linger = time.monotonic() + _LINGER_SECONDS
        while time.monotonic() < linger and self.alive and (busy() or not self._parted()):
            time.sleep(_POLL_SECONDS)
        self._ending = True
        self._control.wake()
        self._thread.join(_END_SECONDS)
        try:
            for name in list(self._peers):
                self.disconnect(name)
        finally:
            self._control.close()

    def _parted(self) -> bool:
        with self._state:
            return self._control.finish()

    def poll(self) -> list[Message]:
        """What has arrived; looks itself, since its thread may need longer to wake. Raises `PeerLostError`."""
        with self._state:
            self._step()
        return self.inbox.drain()

    def _step(self) -> None:
        for name, said in self._control.step():
            self._hear(name, said)

    def _drive(self) -> None:
        while not self._ending:
            with self._state:
                self._step()
                for peer in self.peers:
                    self._look_after(peer)
            self._control.wait(_IDLE_SECONDS)

    def _look_after(self, peer: Peer) -> None:
        """See whether its process lives: one that never came has no connection to break."""
        if peer.error is None:
            try:
                peer.life.check()
            except PeerLostError as error:
                if not self._control.up(peer.name):
                    self.lose(error)

    def _hear(self, name: str, said: bytes | PeerLostError) -> None:
        peer = self._peers.get(name)
        if peer is None or peer.error is not None:
            return
        if isinstance(said, PeerLostError):
            self.lose(said)
            return
        try:
            match self._decoder.decode(said):
                case Invited(gate):
                    peer.invitation = gate
                case Told(places, registered):
                    peer.places.update({(each.device, each.address, each.nbytes): each for each in places})
                    peer.told = max(peer.told, registered)
                case Announced(envelope):
                    self.inbox.deliver(peer.identity, envelope)
        except (TransportError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self.lose(PeerLostError(name, f"it sent {len(said)} bytes that are not a message of weft: {error}"))

    def _say(self, name: str, what: Said) -> None:
        self._control.send(name, msgspec.msgpack.encode(what))
