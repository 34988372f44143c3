"""Control connections between members: small messages over TCP, for transports whose own network carries only bytes.

One listening socket per endpoint and one connection per pair, made by the member whose name sorts first. No threads:
the owner calls `step` in one, which waits for the network, and the rest from any thread under a lock of its own.

In a job with a secret both ends prove that they know it before anything else is heard: who is called answers the first
message with a challenge, who calls answers with its code and a challenge of its own, and gets a code in return. Codes
are of both identities, which are of one life each, both challenges, and who proves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from weft.authentication import Key
from weft.errors import PeerLostError, RecordError
from weft.records import decoded

_LOG = logging.getLogger(__name__)
FRAME_LIMIT_BYTES = 1 << 20
"""Longest message."""
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16
_BACKLOG = 1024
_CHALLENGE_BYTES = 16
_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, tries: a cut link is seen


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """First message of either side: who is speaking, and to whom."""

    identity: str
    to: str


class Proof(msgspec.Struct, frozen=True, array_like=True):
    """Between the hellos of a job with a secret."""

    challenge: bytes
    """Random, for the other end to prove itself by; empty in the last one."""
    code: bytes
    """That this end knows the secret; empty in the first one."""


@dataclass(eq=False)
class _Wire:
    """One socket and what is half-way through it."""

    socket: socket.socket
    connected: bool
    hello: Hello | None = None
    """What who called has said."""
    challenge: bytes = b""
    """What this end has asked."""
    asked: bytes = b""
    """What who was called has asked."""
    proven: bool = False
    """Whether who called has taken the other end's proof."""
    heard: bytearray = field(default_factory=bytearray)
    unsent: deque[memoryview] = field(default_factory=deque)

    def write(self, body: bytes) -> None:
        self.unsent.append(memoryview(_LENGTH.pack(len(body)) + body))

    def flush(self) -> None:
        """Hand what fits to the kernel. Raises `OSError` when the connection broke."""
        with contextlib.suppress(BlockingIOError):
            while self.connected and self.unsent:
                sent = self.socket.send(self.unsent[0])
                if sent < len(self.unsent[0]):
                    self.unsent[0] = self.unsent[0][sent:]
                else:
                    self.unsent.popleft()

    def read(self) -> bool:
        """Take in what the kernel has; False at the end. Raises `OSError` when the connection broke."""
        with contextlib.suppress(BlockingIOError):
            chunk = self.socket.recv(_READ_BYTES)
            self.heard += chunk
            return bool(chunk)
        return True

    def frames(self) -> Iterator[bytes]:
        """Whole messages. Raises `RecordError` for one that is too long."""
        while len(self.heard) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self.heard)
            if length > FRAME_LIMIT_BYTES:
                raise RecordError(f"the other end announces a message of {length} bytes: it is no member of weft")
            if len(self.heard) < _LENGTH.size + length:
                return
            body = bytes(self.heard[_LENGTH.size : _LENGTH.size + length])
            del self.heard[: _LENGTH.size + length]
            yield body


@dataclass(eq=False)
class _Link:
    """A peer: its wire once there is one, and what waits for it."""

    peer: str
    identity: str
    dials: bool
    """Whether this side makes the connection."""
    wire: _Wire | None = None
    up: bool = False
    queued: list[bytes] = field(default_factory=list)


class Control:
    """The control connections of one endpoint."""

    def __init__(self, identity: str, host: str, key: Key | None = None) -> None:
        """Listen on a free port of `host`. Raises `OSError` when it is not this machine's.

        With a `key` nobody is heard who does not prove to know it.
        """
        self.identity = identity
        self._key = key
        self._links: dict[str, _Link] = {}
        self._strangers: set[_Wire] = set()
        """Came in and have not said who they are."""
        self._parked: dict[str, _Wire] = {}
        """Have said so before this side connected to them; by identity."""
        self._events: list[tuple[str, bytes | PeerLostError]] = []
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind((host, 0))
        except OSError:
            self._listener.close()
            raise
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._wake_near, self._wake_far = socket.socketpair()
        self._wake_near.setblocking(False)
        self._wake_far.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_far, selectors.EVENT_READ)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def connect(self, peer: str, identity: str, host: str, port: int, dials: bool) -> None:
        """Reach a peer that is not connected: this side dials, or the other does."""
        link = self._links[peer] = _Link(peer, identity, dials)
        if not dials:
            parked = self._parked.pop(identity, None)
            if parked is not None:
                self._adopt(link, parked)
            return
        wire = _Wire(socket.socket(), connected=False)
        link.wire = wire
        wire.socket.setblocking(False)
        wire.write(msgspec.msgpack.encode(Hello(self.identity, identity)))
        try:
            wire.socket.connect((host, port))
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(link, str(error))
            return
        self._selector.register(wire.socket, selectors.EVENT_WRITE)

    def disconnect(self, peer: str) -> None:
        """Close the connection; nothing of it is heard afterwards. Idempotent."""
        link = self._links.pop(peer, None)
        if link is not None and link.wire is not None:
            self._close(link.wire)
        self._events = [event for event in self._events if event[0] != peer]

    def up(self, peer: str) -> bool:
        """Whether both sides have come."""
        return peer in self._links and self._links[peer].up

    def send(self, peer: str, body: bytes) -> None:
        """Queue a message; nothing happens for a peer that is gone, which `step` has said or will."""
        link = self._links.get(peer)
        if link is None:
            return
        if not link.up or link.wire is None:
            link.queued.append(body)
            return
        link.wire.write(body)
        self._flush(link, link.wire)

    def finish(self) -> bool:
        """Say nothing more, once what was said has left. Whether every peer has answered by closing its end, and so
        has taken in all of it; until then `step` must go on.
        """
        up = [link for link in self._links.values() if link.up]
        for link in up:
            if link.wire is not None and not link.wire.unsent:
                with contextlib.suppress(OSError):  # closed meanwhile: `step` says so
                    link.wire.socket.shutdown(socket.SHUT_WR)
        return not up

    def wait(self, seconds: float) -> None:
        """Wait until the network has something or `wake` is called. Needs no lock."""
        self._selector.select(seconds)

    def wake(self) -> None:
        """End a `wait` in another thread."""
        with contextlib.suppress(BlockingIOError):
            self._wake_near.send(b"\0")

    def step(self) -> list[tuple[str, bytes | PeerLostError]]:
        """Read and write what the network allows now; what was heard, and who was lost, in order."""
        for key, mask in self._selector.select(0):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake_far:
                with contextlib.suppress(BlockingIOError):
                    self._wake_far.recv(4096)
            else:
                self._serve(key.fd, mask)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Close everything."""
        for peer in list(self._links):
            self.disconnect(peer)
        for wire in [*self._strangers, *self._parked.values()]:
            self._close(wire)
        self._selector.close()
        for each in (self._listener, self._wake_near, self._wake_far):
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                _keep_alive(connection)
                wire = _Wire(connection, connected=True)
                self._strangers.add(wire)
                self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, descriptor: int, mask: int) -> None:
        for link in self._links.values():
            if link.wire is not None and link.wire.socket.fileno() == descriptor:
                self._serve_link(link, link.wire, mask)
                return
        for wire in self._strangers:
            if wire.socket.fileno() == descriptor:
                self._serve_stranger(wire)
                return

    def _serve_link(self, link: _Link, wire: _Wire, mask: int) -> None:
        if not wire.connected:
            error = wire.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._fail(link, f"cannot connect: {os.strerror(error)}")
                return
            wire.connected = True
            _keep_alive(wire.socket)
        if mask & selectors.EVENT_READ:
            try:
                more = wire.read()
                for body in wire.frames():
                    self._heard(link, body)
            except (OSError, RecordError) as error:
                self._fail(link, str(error))
                return
            if not more:
                proving = self._key is not None and not link.up
                words = " while both were to prove that they know the job's secret" * proving
                self._fail(link, f"its end of the connection is closed{words}")
                return
        self._flush(link, wire)

    def _heard(self, link: _Link, body: bytes) -> None:
        if link.up:
            self._events.append((link.peer, body))
        elif self._key is not None and link.wire is not None and not link.wire.proven:
            self._prove(self._key, link, link.wire, body)
        elif _hello(body) == Hello(link.identity, self.identity):
            self._come_up(link)
        else:
            raise RecordError("another endpoint answers there")

    def _prove(self, key: Key, link: _Link, wire: _Wire, body: bytes) -> None:
        """As who called: answer the challenge, then check the proof. Raises `RecordError` for what is none."""
        said = _proof(body)
        ends = self.identity.encode(), link.identity.encode()
        if said is not None and not wire.challenge and not said.code and said.challenge:
            wire.asked, wire.challenge = said.challenge, secrets.token_bytes(_CHALLENGE_BYTES)
            code = key.code(b"caller", *ends, wire.asked, wire.challenge)
            wire.write(msgspec.msgpack.encode(Proof(wire.challenge, code)))
        elif said is not None and wire.challenge and key.fits(said.code, b"called", *ends, wire.asked, wire.challenge):
            wire.proven = True
        else:
            raise RecordError("who answers there does not prove that it knows the job's secret")

    def _believes(self, key: Key, wire: _Wire, hello: Hello, body: bytes) -> bool:
        """As who was called: whether this is the answer to the challenge; then this end proves itself, too."""
        said = _proof(body)
        ends = hello.identity.encode(), self.identity.encode()
        if said is None or not said.challenge:
            return False
        if not key.fits(said.code, b"caller", *ends, wire.challenge, said.challenge):
            return False
        wire.write(msgspec.msgpack.encode(Proof(b"", key.code(b"called", *ends, wire.challenge, said.challenge))))
        return True

    def _serve_stranger(self, wire: _Wire) -> None:
        try:
            more = wire.read()
            body = next(wire.frames(), None)
        except (OSError, RecordError):
            more, body = False, None
        if body is None and more:
            return
        hello = wire.hello or (_hello(body) if body is not None else None)
        if self._key is not None and hello is not None and hello.to == self.identity:
            if wire.hello is None:
                wire.hello, wire.challenge = hello, secrets.token_bytes(_CHALLENGE_BYTES)
                wire.write(msgspec.msgpack.encode(Proof(wire.challenge, b"")))
                with contextlib.suppress(OSError):  # `read` says so
                    wire.flush()
                return
            if body is None or not self._believes(self._key, wire, hello, body):
                _LOG.warning(
                    "refused a connection to %s: who says to be %s does not prove that it knows the job's secret",
                    self.identity, hello.identity,
                )  # fmt: skip
                hello = None
        self._strangers.discard(wire)
        if hello is None or hello.to != self.identity:
            self._close(wire)
            return
        for link in self._links.values():
            if link.identity == hello.identity and not link.dials and link.wire is None:
                self._adopt(link, wire)
                return
        with contextlib.suppress(OSError):  # its proof; who adopts it notices
            wire.flush()
        self._selector.unregister(wire.socket)
        earlier = self._parked.pop(hello.identity, None)
        if earlier is not None:
            earlier.socket.close()
        self._parked[hello.identity] = wire

    def _adopt(self, link: _Link, wire: _Wire) -> None:
        """Make a connection that came in the link's own, and answer."""
        link.wire = wire
        wire.write(msgspec.msgpack.encode(Hello(self.identity, link.identity)))
        self._watch(wire)
        self._come_up(link)
        self._serve_link(link, wire, selectors.EVENT_READ)

    def _come_up(self, link: _Link) -> None:
        link.up = True
        queued, link.queued = link.queued, []
        for body in queued:
            self.send(link.peer, body)

    def _flush(self, link: _Link, wire: _Wire) -> None:
        try:
            wire.flush()
        except OSError as error:
            self._fail(link, str(error))
        if self._links.get(link.peer) is link:
            self._watch(wire)

    def _watch(self, wire: _Wire) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if wire.unsent or not wire.connected else 0)
        known = self._selector.get_map().get(wire.socket)
        if known is None:
            self._selector.register(wire.socket, wanted)
        elif known.events != wanted:
            self._selector.modify(wire.socket, wanted)

    def _fail(self, link: _Link, reason: str) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self._events.append((link.peer, PeerLostError(link.peer, reason)))
            if link.wire is not None:
                self._close(link.wire)

    def _close(self, wire: _Wire) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(wire.socket)
        with contextlib.suppress(OSError):
            wire.socket.shutdown(socket.SHUT_WR)
        wire.socket.close()


def _hello(body: bytes) -> Hello | None:
    """The message, or None when it is no hello."""
    try:
        return decoded(Hello, body, "")
    except RecordError:
        return None


def _proof(body: bytes) -> Proof | None:
    """The message, or None when it is no proof."""
    try:
        return decoded(Proof, body, "")
    except RecordError:
        return None


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
