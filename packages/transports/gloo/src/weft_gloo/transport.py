"""The `gloo` transport: `weft.contracts.Transport` by two-sided messages over CPU memory."""

from __future__ import annotations

import atexit
import functools
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from weft.contracts import Bucket, Capabilities, Event, Prepared, Stream, TransferProgram, Work
from weft.contracts import Message as Arrival
from weft.deadline import Deadline
from weft.endpoint import Envelope, Inbox, Programs, RegionBook, check_program, encode
from weft.errors import ConfigError, PeerLostError, TransportError
from weft.hosts import check_reachable, choose_host
from weft.member import Member, Region, Tag
from weft.records import decoded
from weft_gloo.link import LINGER_SECONDS, Link
from weft_gloo.messages import Message, dropped, messages_of
from weft_gloo.options import GlooOptions
from weft_gloo.parcels import Expected, Parcel
from weft_gloo.rendezvous import listen, meet, serve

CAPABILITIES = Capabilities(
    one_sided=False,
    devices=("cpu",),
    members_may_change=True,
    direct_run_bytes=1 << 20,
    max_segments=1 << 20,
)

_LOOK_SECONDS = 0.002


class Address(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs."""

    identity: str
    """Unique to this life of the endpoint."""
    host: str
    port: int
    """Of the store that this member hosts."""
    packing: tuple[int, int]
    """`pack_below_bytes` and `pack_bytes`, which must be equal everywhere (trap 42)."""


@dataclass(frozen=True, slots=True)
class GlooRegistration:
    """Memory that messages may go to and come from; gloo itself needs no registration."""

    region: Region


@dataclass(frozen=True, slots=True, eq=False)
class GlooPrepared:
    """A program's buckets as messages."""

    program: TransferProgram
    sends: Mapping[int, tuple[Bucket, tuple[Message, ...]]]
    receives: Mapping[int, tuple[Bucket, tuple[Message, ...]]]
    active: dict[int, GlooWork]
    """The last post of every bucket."""


@dataclass(slots=True, eq=False)
class GlooWork:
    """One posted bucket."""

    link: Link
    parcel: Parcel
    after: Event | None
    submitted: bool = False

    def advance(self) -> bool:
        """Hand it to the link once its event is reached; whether that has happened."""
        if not self.submitted and (self.after is None or self.after.query()):
            self.submitted = True
            self.link.submit(self.parcel)
        return self.submitted

    def poll(self) -> bool:
        """Whether the source bytes have left; raises what prevented it, again and again."""
        self.advance()
        if self.parcel.error is not None:
            raise self.parcel.error.again()
        return self.parcel.done

    def cancel(self) -> None:
        """Give it up. A bucket whose first byte has left is sent to its end."""
        self.submitted = True
        self.link.cancel(self.parcel)


class GlooTransport:
    """One endpoint: a small store of its own, and a process group of two per peer."""

    capabilities = CAPABILITIES

    def __init__(self, options: GlooOptions) -> None:
        self._options = options
        self._member: Member | None = None
        self._closed = False
        self._address: Address | None = None
        self._store: Any = None
        self._device: Any = None
        self._regions = RegionBook("gloo", CAPABILITIES)
        self._links: dict[str, tuple[Address, Link]] = {}
        self._waiting: list[GlooWork] = []
        self._inbox = Inbox()
        self._programs: Programs[GlooPrepared] = Programs()
        self._programs_changed = threading.Condition()

    def open(self, member: Member) -> None:
        """Listen on a free port. Raises `ConfigError` for a host or interface that does not exist."""
        if self._member is not None or self._closed:
            raise TransportError(f"transport 'gloo' of {member.name} is {'closed' if self._closed else 'open already'}")
        host = choose_host("gloo", self._options.host, self._options.interface, member.nics)
        try:
            self._device = listen(host)
            self._store = serve(host)
        except RuntimeError as error:
            raise TransportError(f"transport 'gloo' of {member.name} cannot listen on {host}: {error}") from error
        packing = (self._options.pack_below_bytes, self._options.pack_bytes)
        identity = f"{member.name}#{member.incarnation}/{uuid.uuid4().hex}"
        self._address = Address(identity, host, self._store.port, packing)
        self._member = member
        atexit.register(self.close)  # threads that are inside gloo when the interpreter goes abort the process

    def register(self, region: Region, deadline: Deadline) -> GlooRegistration:
        """Note an allocation."""
        self._require_open()
        self._regions.check(region)
        self._regions.add(region)
        return GlooRegistration(region)

    def deregister(self, registration: Any) -> None:
        """Forget it."""
        self._regions.remove(registration.region)

    def address(self) -> bytes:
        """Where this endpoint's store listens. Does not depend on regions."""
        return msgspec.msgpack.encode(self._require_open()[1])

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """Start meeting the peer, which must do the same; `prepare` waits for it, until then posts and signals queue.

        So members may connect to each other in any order. Raises `ConfigError` for a loopback address of another host
        and for different packing; a peer that does not come before the deadline is lost.
        """
        member, own = self._require_open()
        new = decoded(Address, address, f"the address of {peer.name} is none of transport 'gloo'")
        check_reachable("gloo", member.host, own.host, peer.host, new.host)
        if new.packing != own.packing:
            raise ConfigError(
                f"pack_below_bytes and pack_bytes are {own.packing} here, {new.packing} at {peer.name}: make them equal"
            )
        known = self._links.get(peer.name)
        if known is not None and known[0] == new and known[1].error is None:
            return
        self.disconnect(peer.name)
        first = member.name < peer.name
        low, high = (own, new) if first else (new, own)
        identity = uuid.uuid4().hex
        link = Link(
            peer.name,
            functools.partial(
                meet,
                low.host,
                low.port,
                0 if first else 1,
                f"{low.identity}|{high.identity}",
                peer.name,
                self._device,
                deadline,
            ),
            1 if first else 0,
            self._options.pack_bytes,
            self._options.depth,
            functools.partial(self._expected, peer.name),
            functools.partial(self._inbox.deliver, identity),
            self._inbox.lose,
            self._inbox.stir,
        )
        self._links[peer.name] = (new, link)
        self._inbox.admit(peer.name, identity)

    def disconnect(self, peer: str) -> None:
        """Forget a peer."""
        self._disconnect(peer, Deadline.after(LINGER_SECONDS))

    def _disconnect(self, peer: str, linger: Deadline) -> None:
        known = self._links.pop(peer, None)
        if known is not None:
            self._inbox.expel(peer)
            known[1].close(linger)

    def prepare(self, program: TransferProgram, deadline: Deadline) -> GlooPrepared:
        """Divide buckets into messages, and wait until every connection is up: one that is not cannot be seen to break.

        Raises what broke a connection of the program; the loss of another peer is said by `poll`.
        """
        self._require_open()
        check_program(program, self._regions, CAPABILITIES)
        sends, receives = self._messages(program, program.sends), self._messages(program, program.receives)
        prepared = GlooPrepared(program, sends, receives, {})
        links = [self._link(peer) for peer in sorted({b.peer for b in (*program.sends, *program.receives)})]
        others = [link for _, link in self._links.values() if link not in links]
        deadline.wait(
            lambda: all(link.ready() for link in links) and all(link.up or link.error for link in others),
            "connecting",
            lambda: [link.peer for link in (*links, *others) if not link.up],
        )
        with self._programs_changed:
            self._programs.add(program.key, prepared)
            self._programs_changed.notify_all()
        return prepared

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Queue a bucket at its peer's link."""
        self._require_open()
        if not isinstance(prepared, GlooPrepared) or bucket not in prepared.sends:
            raise ConfigError(f"bucket {bucket} is no send of this program")
        earlier = prepared.active.get(bucket)
        if earlier is not None and not earlier.parcel.done:
            raise TransportError(f"bucket {bucket} has an active post: wait for its work before posting it again")
        what, messages = prepared.sends[bucket]
        envelope = encode(tag, bucket, note, prepared.program.key)
        work = GlooWork(self._link(what.peer), Parcel(envelope, messages), after)
        prepared.active[bucket] = work
        if not work.advance():
            self._waiting.append(work)
        return work

    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """Queue a message at the peer's link."""
        self._require_open()
        link = self._link(peer)
        if link.error is not None:
            raise link.error.again()
        link.submit(Parcel(encode(tag, None, note), ()))

    def poll(self) -> Sequence[Arrival]:
        """What the links' threads have taken in; also starts posts whose event has been reached."""
        self._require_open()
        self._waiting = [work for work in self._waiting if not work.advance()]
        return self._inbox.drain()

    def wait(self, seconds: float) -> None:
        """Until something has arrived, left or broken."""
        self._inbox.wait(seconds)

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """Nothing to do: the bytes were written by this process."""

    def release(self, prepared: Prepared) -> None:
        """Forget a program; what still arrives for it is dropped, for the last few programs."""
        if isinstance(prepared, GlooPrepared):
            for work in prepared.active.values():
                work.cancel()
            with self._programs_changed:
                if self._programs.release(prepared.program.key, prepared, keep=True):
                    self._programs_changed.notify_all()

    def close(self) -> None:
        """End links, then the store."""
        atexit.unregister(self.close)
        linger = Deadline.after(LINGER_SECONDS)
        for _, link in self._links.values():
            link.say_farewell()
        for peer in list(self._links):
            self._disconnect(peer, linger)
        self._waiting.clear()
        self._programs = Programs()  # their works refer to links, and those to this transport
        self._store = None
        self._device = None
        self._closed = True

    def _messages(
        self, program: TransferProgram, buckets: Sequence[Bucket]
    ) -> dict[int, tuple[Bucket, tuple[Message, ...]]]:
        sizes = self._options.pack_below_bytes, self._options.pack_bytes
        return {bucket.index: (bucket, messages_of(bucket, program.regions, *sizes)) for bucket in buckets}

    def _expected(self, peer: str, envelope: Envelope, stopped: Callable[[], bool]) -> Expected | None:
        """Where a bucket's payload goes. Waits, in the link's thread, for a program that is not prepared yet.

        None when the link closes meanwhile. Raises `TransportError` for a bucket that its program does not have.
        """
        key = envelope.program
        with self._programs_changed:
            while (prepared := self._programs.made(key) or self._programs.kept(key)) is None:
                if stopped():
                    return None
                self._programs_changed.wait(_LOOK_SECONDS)
            wanted = self._programs.made(key) is not None
        bucket, messages = prepared.receives.get(envelope.bucket or 0, (None, ()))
        if bucket is None or bucket.peer != peer:
            raise TransportError(f"bucket {envelope.bucket} is not expected from {peer}")
        return Expected(messages if wanted else dropped(messages), wanted)

    def _link(self, peer: str) -> Link:
        if peer not in self._links:
            raise PeerLostError(peer, "not connected")
        return self._links[peer][1]

    def _require_open(self) -> tuple[Member, Address]:
        if self._closed or self._member is None or self._address is None:
            raise TransportError(f"transport 'gloo' is {'closed' if self._closed else 'not open yet'}")
        return self._member, self._address
