"""The `mapped` transport: `weft.contracts.Transport` between processes of one host."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from weft.authentication import Key
from weft.contracts import Bucket, Capabilities, Event, Message, Prepared, Stream, TransferProgram, Work
from weft.control import Control
from weft.deadline import Deadline
from weft.endpoint import Envelope, RegionBook, check_program, encode
from weft.errors import ConfigError, PeerLostError, TransportError
from weft.expandable import CudaSegments, refuse_expandable
from weft.member import Member, Region, Tag
from weft.records import decoded
from weft_mapped.chunks import Reach, chunks_of
from weft_mapped.cuda import Streams, reached
from weft_mapped.gate import MOST_REGIONS, Gate, Pass
from weft_mapped.kernel import Life, allow_writers, start_time
from weft_mapped.link import Link, Peer
from weft_mapped.options import MappedOptions
from weft_mapped.places import Owner, Place, Private, summary
from weft_mapped.writers import Post, Send, Writers

_LOG = logging.getLogger(__name__)
_HOST = "127.0.0.1"

CAPABILITIES = Capabilities(
    one_sided=True,
    devices=("cpu", "cuda"),
    members_may_change=True,
    direct_run_bytes=2 << 10,
    max_segments=1 << 20,
)


class Address(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to connect; how regions are reached is told over the connection."""

    transport: str
    identity: str
    """Unique to this life of the endpoint."""
    host: str
    """`Member.host`."""
    processes: int
    """The namespace that `process` is a number of (the inode of `/proc/self/ns/pid`)."""
    process: int
    started: int
    """When the process did, so that another one of this number is not taken for it."""
    port: int
    registered: int
    """Registrations so far."""


@dataclass(slots=True, eq=False)
class MappedRegistration:
    """Memory that peers may write."""

    region: Region
    serial: int
    place: Place | None = None
    """How peers reach it, once that is known."""
    live: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class MappedPrepared:
    """A program with its sends as copies."""

    program: TransferProgram
    peers: dict[int, str]
    """Receivers of its sends, by bucket."""
    sends: dict[int, Send]
    """Without those whose receiver has gone since."""


@dataclass(frozen=True, slots=True, eq=False)
class MappedWork:
    """One posted bucket."""

    writers: Writers
    post: Post

    def poll(self) -> bool:
        """Whether every byte is in place over there; raises what prevented it, again and again."""
        if self.post.error is not None:
            raise self.post.error.again()
        return not self.post.active

    def cancel(self) -> None:
        """Give it up. Copies under way, of at most `chunk_bytes` each, are made to their end."""
        self.writers.end(self.post)


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    member: Member
    identity: str
    control: Control
    link: Link
    writers: Writers


class MappedTransport:
    """One endpoint."""

    capabilities = CAPABILITIES

    def __init__(self, options: MappedOptions) -> None:
        self._options = options
        self._state = threading.Condition(threading.RLock())
        self._opened: _Opened | None = None
        self._key: Key | None = None
        self._closed = False
        self._regions = RegionBook("mapped", CAPABILITIES)
        self._owner = Owner()
        self._segments = CudaSegments()
        self._streams = Streams()
        self._registrations: list[MappedRegistration] = []
        self._count = 0
        self._described = 0
        """Of how many registrations, from the first, it is known how they are reached."""
        self._reaches: dict[str, Reach] = {}
        self._prepared: list[MappedPrepared] = []

    def trust(self, key: Key) -> None:
        """Hear nobody over control connections who does not know it."""
        self._key = key

    def open(self, member: Member) -> None:
        """Listen on loopback, and let peers write. Raises `TransportError` where the system is not Linux."""
        if self._opened is not None or self._closed:
            state = "closed" if self._closed else "open already"
            raise TransportError(f"transport 'mapped' of {member.name} is {state}")
        if sys.platform != "linux":
            raise TransportError(f"transport 'mapped' needs Linux, this is {sys.platform}: use transport gloo")
        if self._options.allow_writers:
            allow_writers()
        identity = f"{member.name}#{member.incarnation}/{uuid.uuid4().hex}"
        try:
            control = Control(identity, _HOST, self._key)
        except OSError as error:
            raise TransportError(f"transport 'mapped' of {member.name} cannot listen on {_HOST}: {error}") from error
        link = Link(control, self._state, self._end_peer)
        writers = Writers(member.name, self._options.threads, self._state, self._announce, link.lose)
        self._opened = _Opened(member, identity, control, link, writers)
        atexit.register(self.close)  # a thread that the interpreter finds at work when it goes may abort the process

    def register(self, region: Region, deadline: Deadline) -> MappedRegistration:
        """Note an allocation. Raises `ConfigError` for memory that overlaps what is registered, or is not exported."""
        self._require_open()
        self._regions.check(region)
        refuse_expandable(region, self._segments.around(region.device), "CUDA does not let other processes map")
        if self._count == MOST_REGIONS:
            raise TransportError(f"transport 'mapped' registers {MOST_REGIONS} regions in its life: open a new one")
        self._regions.add(region)
        registration = MappedRegistration(region, self._count)
        self._count += 1
        self._registrations.append(registration)
        return registration

    def deregister(self, registration: Any) -> None:
        """Nothing writes the region once this returns; it waits for copies under way, which take milliseconds.

        Raises `TransportError` when a sender has been stopped in the middle of one.
        """
        if registration.live and self._opened is not None:
            registration.live = False
            self._registrations.remove(registration)
            self._regions.remove(registration.region)
            for peer in self._opened.link.peers:
                peer.gate.withdraw(registration.serial)

    def address(self) -> bytes:
        """Process, port, and how many regions there are; peers that are connected are told of new ones."""
        opened = self._require_open()
        self._describe()
        process = os.getpid()
        return msgspec.msgpack.encode(
            Address(
                "mapped", opened.identity, opened.member.host, os.stat("/proc/self/ns/pid").st_ino, process,
                start_time(process) or 0, opened.control.port, self._count,
            )
        )  # fmt: skip

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """Start meeting the peer, which must do the same; `prepare` waits for it, until then signals queue.

        Raises `TransportError` for a peer that is not on this host or not among the processes seen here.
        """
        opened = self._require_open()
        new = decoded(Address, address, f"the address of {peer.name} is none of transport 'mapped'")
        if new.transport != "mapped":
            raise TransportError(f"the address of {peer.name} is of transport {new.transport!r}, this one is 'mapped'")
        if opened.member.host != peer.host:
            raise TransportError(
                f"transport 'mapped' reaches processes of its own host: {opened.member.name} is on "
                f"{opened.member.host!r}, {peer.name} on {peer.host!r}; use transport nixl"
            )
        if os.stat("/proc/self/ns/pid").st_ino != new.processes:
            raise TransportError(
                f"transport 'mapped' does not see process {new.process} of {peer.name}: it is in another container; "
                "let them share processes and loopback (docker run --pid --network, Kubernetes shareProcessNamespace), "
                "or use transport nixl"
            )
        known = opened.link.known(peer.name)
        if known is not None and known.error is None and known.endpoint == new.identity:
            known.registered = new.registered
            return
        life = Life(peer.name, new.process, new.started)
        gate = Gate(peer.name, f"weft-{uuid.uuid4().hex}")
        made = Peer(peer.name, new.identity, new.registered, life, gate)
        opened.link.connect(made, new.identity, _HOST, new.port, dials=opened.member.name < peer.name)
        self._describe()
        self._tell(made, self._registrations)

    def disconnect(self, peer: str) -> None:
        """Forget a peer. Nothing is written by it once this returns."""
        if self._opened is not None:
            self._opened.link.disconnect(peer)

    def prepare(self, program: TransferProgram, deadline: Deadline) -> MappedPrepared:
        """Divide sends into copies, having seen how each of the peers' regions is reached, and that it is.

        Waits until those that it sends to have connected. Raises `PeerLostError`, or `TransportError` that says what
        forbids it.
        """
        link = self._require_open().link
        check_program(program, self._regions, CAPABILITIES)
        receivers = sorted({bucket.peer for bucket in program.sends})

        def absent() -> list[str]:
            return [peer.name for peer in map(link.reach, receivers) if not peer.ready]

        deadline.wait(lambda: not absent(), "connecting", absent)
        prepared = MappedPrepared(program, {bucket.index: bucket.peer for bucket in program.sends}, {})
        self._prepared.append(prepared)
        try:
            for name in receivers:
                self._prepare(prepared, link.reach(name))
        except TransportError:
            self.release(prepared)
            raise
        return prepared

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Queue a bucket for the copying threads. Without an event it comes after what the caller's current stream
        still does.
        """
        opened = self._require_open()
        if not isinstance(prepared, MappedPrepared) or bucket not in prepared.peers:
            raise ConfigError(f"bucket {bucket} is no send of this program")
        opened.link.reach(prepared.peers[bucket])
        if bucket not in prepared.sends:
            raise ConfigError(f"the peer of bucket {bucket} has connected anew: prepare again")
        send = prepared.sends[bucket]
        if send.post is not None:
            raise TransportError(f"bucket {bucket} has an active post: wait for its work before posting it again")
        encode(tag, bucket, note)  # refuses a note that is too long
        event = reached(send.device) if after is None else after
        post = Post(send, Envelope(tag, bucket, note, prepared.program.key), event)
        opened.writers.put(post)
        return MappedWork(opened.writers, post)

    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """Send it over the control connection."""
        link = self._require_open().link
        encode(tag, None, note)  # refuses a note that is too long
        link.reach(peer)
        link.announce(peer, Envelope(tag, None, note))

    def poll(self) -> Sequence[Message]:
        """What has arrived."""
        return self._require_open().link.poll()

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """Nothing to do: a bucket is announced when its last copy is over, on a GPU too."""

    def release(self, prepared: Prepared) -> None:
        """Forget a program; what is still active is cancelled. Waits for copies under way, which take milliseconds."""
        if isinstance(prepared, MappedPrepared) and prepared in self._prepared and self._opened is not None:
            self._prepared.remove(prepared)
            sends = list(prepared.sends.values())
            self._opened.writers.end_all(sends)
            self._opened.writers.settle(sends)
            prepared.sends.clear()

    def close(self) -> None:
        """Let what was sent leave, end connections, then copies; afterwards nothing is written here.

        Raises `TransportError` when a sender has been stopped in the middle of a copy.
        """
        atexit.unregister(self.close)
        opened, self._closed = self._opened, True
        if opened is not None:
            try:
                opened.link.close(opened.writers.busy)
            finally:
                opened.writers.close()
                self._opened = None
                self._prepared.clear()
                self._reaches.clear()
                self._registrations.clear()
                self._owner.close()

    def _prepare(self, prepared: MappedPrepared, peer: Peer) -> None:
        """The sends to one peer."""
        program = prepared.program
        buckets = [bucket for bucket in program.sends if bucket.peer == peer.name]
        rows = np.concatenate([bucket.segments for bucket in buckets])
        places: dict[int, Place] = {}
        for index in np.unique(rows["remote_region"][rows["nbytes"] > 0]).tolist():
            region = program.remote_regions[peer.name][index]
            place = peer.places.get((region.device, region.address, region.nbytes))
            if place is None:
                raise TransportError(f"{region} is not registered by {peer.name}, or only since this side connected")
            places[index] = place
        if peer.name not in self._reaches and peer.invitation is not None:
            self._reaches[peer.name] = Reach(peer.life, Pass(peer.life, peer.invitation), self._streams)
        for bucket in buckets:
            chunks = chunks_of(bucket, program, places, self._reaches[peer.name], self._options.chunk_bytes)
            prepared.sends[bucket.index] = Send(bucket, chunks, _device(bucket, program.regions))
        _LOG.info("transport 'mapped': regions of %s: %s", peer.name, summary(places.values()) or "none")

    def _describe(self) -> None:
        """Find out how what was registered lately is reached, and tell the peers that are connected."""
        opened = self._require_open()
        new = [each for each in self._registrations if each.live and each.serial >= self._described]
        on_cpu = [each.region for each in new if each.region.device.type == "cpu"]
        hows = iter(self._owner.describe(on_cpu))
        for each in new:
            region = each.region
            how = next(hows) if region.device.type == "cpu" else Private()  # CUDA's: one for each peer, in `_tell`
            each.place = Place(each.serial, region.address, region.nbytes, str(region.device), how)
        if self._described < self._count:
            self._described = self._count
            for peer in opened.link.peers:
                self._tell(peer, new)

    def _tell(self, peer: Peer, registrations: Sequence[MappedRegistration]) -> None:
        places = [self._owner.place(each.region, each.place) for each in registrations if each.live and each.place]
        self._require_open().link.tell(peer, places, self._described)

    def _announce(self, post: Post) -> None:
        """Called by a copying thread when all bytes are in place."""
        if self._opened is not None:
            self._opened.link.announce(post.send.bucket.peer, post.envelope)

    def _end_peer(self, peer: str, error: PeerLostError) -> None:
        """Called, with the lock held, when a peer is lost or disconnected."""
        gone = [send for prepared in self._prepared for send in prepared.sends.values() if send.bucket.peer == peer]
        if self._opened is not None:
            self._opened.writers.end_all(gone, error)
        self._reaches.pop(peer, None)
        for prepared in self._prepared:
            for index in [index for index, name in prepared.peers.items() if name == peer]:
                prepared.sends.pop(index, None)

    def _require_open(self) -> _Opened:
        if self._closed or self._opened is None:
            raise TransportError(f"transport 'mapped' is {'closed' if self._closed else 'not open yet'}")
        if not self._opened.link.alive:
            raise TransportError("transport 'mapped' has stopped: its thread failed, as stderr says")
        return self._opened


def _device(bucket: Bucket, regions: Sequence[Region]) -> torch.device:
    """Where the bucket comes from: a CUDA device if any of its segments does."""
    devices = [regions[index].device for index in np.unique(bucket.segments["region"]).tolist()]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
