"""`weft.contracts.Transport` over TCP: the sender says where its bytes go, a thread of the receiver puts them there."""

from __future__ import annotations

import atexit
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from example_weft_sockets.wire import Channel, Frame, Header, hang_up, receive, receive_header
from weft.contracts import Bucket, Capabilities, Event, Message, Prepared, Stream, TransferProgram, Work
from weft.deadline import Deadline
from weft.endpoint import Inbox, RegionBook, check_program, decode, encode
from weft.errors import ConfigError, PeerLostError, TransportError, WeftError
from weft.member import Member, Region, Tag

CAPABILITIES = Capabilities(
    one_sided=True, devices=("cpu",), members_may_change=True, direct_run_bytes=64 << 10, max_segments=1 << 20
)

_END_SECONDS = 5.0


class Options(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="example-sockets"):
    """What `transport_options` may hold."""

    host: str = "127.0.0.1"
    """Address to listen on, which peers reach."""


class Address(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs."""

    identity: str
    """Unique to this life of the endpoint, so that nothing of an earlier one is mistaken for it."""
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class SocketRegistration:
    """Memory that peers may write."""

    region: Region


@dataclass(frozen=True, slots=True, eq=False)
class SocketPrepared:
    """A checked program, with the places and the memory of every bucket to send."""

    program: TransferProgram
    sends: Mapping[int, tuple[str, bytes, Sequence[memoryview]]]
    active: dict[int, SocketWork]
    """The last post of every bucket."""


@dataclass(slots=True, eq=False)
class SocketWork:
    """One posted bucket: goes to its channel as soon as its event is reached."""

    channel: Channel
    frame: Frame
    after: Event | None

    def advance(self) -> bool:
        """Whether there is nothing left to start."""
        if self.after is not None and self.after.query():
            self.after = None
            self.channel.submit(self.frame)
        return self.after is None or self.frame.cancelled

    def poll(self) -> bool:
        """Whether the source bytes have left; raises what prevented it."""
        self.advance()
        if self.frame.error is not None:
            raise self.frame.error
        return self.frame.done

    def cancel(self) -> None:
        """Give it up, unless its first byte has left."""
        self.frame.cancelled = True


class SocketTransport:
    """One endpoint: a listener, a thread for every connection that comes in, a channel for every one that goes out."""

    capabilities = CAPABILITIES

    def __init__(self, options: Options) -> None:
        self._options = options
        self._own: Address | None = None
        self._closed = False
        self._listener = socket.socket()
        self._regions = RegionBook("example-sockets", CAPABILITIES)
        self._inbox = Inbox()
        self._peers: dict[str, tuple[Address, Channel]] = {}
        self._waiting: list[SocketWork] = []
        self._lock = threading.Lock()
        self._incoming: dict[socket.socket, str] = {}  # connection -> identity of whoever is at its other end
        self._retired: set[str] = set()
        self._threads: list[threading.Thread] = []

    def open(self, member: Member) -> None:
        """Listen on a free port. Raises `ConfigError` for a host that is not this machine's."""
        try:
            self._listener.bind((self._options.host, 0))
        except OSError as error:
            raise ConfigError(f"transport 'example-sockets': cannot listen on {self._options.host}: {error}") from error
        self._listener.listen()
        identity = f"{member.name}#{member.incarnation}/{uuid.uuid4().hex}"
        self._own = Address(identity, self._options.host, self._listener.getsockname()[1])
        self._start(self._accept)
        atexit.register(self.close)  # a thread that the interpreter finds at work when it goes may abort the process

    def register(self, region: Region, deadline: Deadline) -> SocketRegistration:
        """Let peers write this memory."""
        self._require_open()
        self._regions.check(region)
        self._regions.add(region)
        return SocketRegistration(region)

    def deregister(self, registration: Any) -> None:
        """Refuse what peers write there afterwards."""
        self._regions.remove(registration.region)

    def address(self) -> bytes:
        """Where this endpoint listens."""
        return msgspec.msgpack.encode(self._require_open())

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """Open the connection for what goes to the peer; the peer opens that for what comes from it."""
        own, theirs = self._require_open(), msgspec.msgpack.decode(address, type=Address)
        known = self._peers.get(peer.name)
        if known is not None and known[0] == theirs and known[1].error is None:
            return
        self.disconnect(peer.name)
        try:
            connection = socket.create_connection((theirs.host, theirs.port), max(0.001, deadline.remaining()))
        except OSError as error:
            raise PeerLostError(peer.name, f"{theirs.host}:{theirs.port} does not answer: {error}") from error
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = Channel(peer.name, connection, self._inbox.lose)
        self._threads.append(channel.thread)
        channel.submit(Frame(Header(own.identity.encode())))
        self._peers[peer.name] = (theirs, channel)
        with self._lock:
            self._retired.discard(theirs.identity)
        self._inbox.admit(peer.name, theirs.identity)

    def disconnect(self, peer: str) -> None:
        """Forget a peer, and hang up on it."""
        known = self._peers.pop(peer, None)
        if known is not None:
            known[1].close()
            self._inbox.expel(peer)
            with self._lock:
                self._retired.add(known[0].identity)
                ended = [connection for connection, who in self._incoming.items() if who == known[0].identity]
            for connection in ended:
                hang_up(connection)

    def prepare(self, program: TransferProgram, deadline: Deadline) -> SocketPrepared:
        """Check the program and write down where every bucket's bytes come from and go to."""
        self._require_open()
        check_program(program, self._regions, CAPABILITIES)
        return SocketPrepared(program, {bucket.index: _outline(program, bucket) for bucket in program.sends}, {})

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Hand a bucket to its peer's channel, once `after` is reached."""
        self._require_open()
        if not isinstance(prepared, SocketPrepared) or bucket not in prepared.sends:
            raise ConfigError(f"bucket {bucket} is no send of this program")
        earlier = prepared.active.get(bucket)
        if earlier is not None and not (earlier.frame.done or earlier.frame.cancelled):
            raise TransportError(f"bucket {bucket} has an active post: wait for its work before posting it again")
        peer, places, memory = prepared.sends[bucket]
        header = Header(encode(tag, bucket, note, prepared.program.key), places)
        work = SocketWork(self._channel(peer), Frame(header, memory), after)
        prepared.active[bucket] = work
        if after is None:
            work.channel.submit(work.frame)
        else:
            self._waiting.append(work)
        return work

    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """Hand a message to the peer's channel."""
        self._require_open()
        channel = self._channel(peer)
        if channel.error is not None:
            raise channel.error
        channel.submit(Frame(Header(encode(tag, None, note))))

    def poll(self) -> Sequence[Message]:
        """What threads have taken in; also starts posts whose event has been reached."""
        self._require_open()
        self._waiting = [work for work in self._waiting if not work.advance()]
        return self._inbox.drain()

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """Nothing to do: this process has written the bytes."""

    def release(self, prepared: Prepared) -> None:
        """Give up what has not been sent."""
        if isinstance(prepared, SocketPrepared):
            for work in prepared.active.values():
                work.cancel()

    def close(self) -> None:
        """Send what is on its way, as long as somebody takes it; hang up on everybody; wait for the threads."""
        self._closed = True
        atexit.unregister(self.close)
        channels, until = [channel for _, channel in self._peers.values()], time.monotonic() + _END_SECONDS
        for channel in channels:
            channel.finish()
        for channel in channels:
            channel.thread.join(max(0.0, until - time.monotonic()))
        for peer in list(self._peers):
            self.disconnect(peer)
        with self._lock:
            connections = [*self._incoming, self._listener]
        for connection in connections:
            hang_up(connection)
        while self._threads:
            self._threads.pop().join(_END_SECONDS)
        self._waiting.clear()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with self._listener:
            while not self._closed:
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # closed
                    return
                with self._lock:
                    self._incoming[connection] = ""
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        """Take in what one peer sends until it ends, and say so if this side still counts on it."""
        identity, why = "", "its connection has ended"
        try:
            with connection:
                while (header := receive_header(connection)) is not None:
                    if identity:
                        self._take(connection, header)
                        self._inbox.deliver(identity, decode(header.message, identity))
                    elif not self._welcome(connection, identity := header.message.decode()):
                        return
        except (OSError, WeftError) as error:
            why = str(error)
        with self._lock:
            self._incoming.pop(connection, None)
        for peer, (address, _) in list(self._peers.items()):
            if address.identity == identity:
                self._inbox.lose(PeerLostError(peer, why))

    def _welcome(self, connection: socket.socket, identity: str) -> bool:
        """Note who is there, unless that life is over or this endpoint is closed."""
        with self._lock:
            welcome = not self._closed and identity not in self._retired
            if welcome:
                self._incoming[connection] = identity
        return welcome

    def _take(self, connection: socket.socket, header: Header) -> None:
        """Read a bucket's bytes to where they belong. Raises `TransportError` for memory that is not registered."""
        for place, size, offset, nbytes in np.frombuffer(header.places, np.int64).reshape(-1, 4).tolist():
            region = self._regions.find("cpu", place, size)
            if region is None or not 0 <= offset <= offset + nbytes <= size:
                raise TransportError(f"wrote {nbytes} bytes at {offset} of {place:#x}+{size}, which are not registered")
            if not receive(connection, region.memory.numpy().data[offset : offset + nbytes]):
                raise TransportError("its connection has ended in the middle of a bucket")

    def _channel(self, peer: str) -> Channel:
        if peer not in self._peers:
            raise PeerLostError(peer, "not connected")
        return self._peers[peer][1]

    def _require_open(self) -> Address:
        if self._closed or self._own is None:
            raise TransportError(f"transport 'example-sockets' is {'closed' if self._closed else 'not open yet'}")
        return self._own


def _outline(program: TransferProgram, bucket: Bucket) -> tuple[str, bytes, Sequence[memoryview]]:
    """A bucket's peer, the places its bytes go to, and the memory that they come from."""
    remote = program.remote_regions.get(bucket.peer, ())
    sources = [region.memory.numpy().data for region in program.regions]
    places, memory = [], []
    for region, offset, remote_region, remote_offset, nbytes in bucket.segments.tolist():
        if nbytes:
            places.append((remote[remote_region].address, remote[remote_region].nbytes, remote_offset, nbytes))
            memory.append(sources[region][offset : offset + nbytes])
    return bucket.peer, np.array(places, np.int64).tobytes(), memory
