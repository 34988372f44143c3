"""What every transport does the same way: options, region bookkeeping, program checks, message envelopes, the inbox.

Nothing here talks to a network. A transport that uses these parts behaves like the others in every respect that the
conformance suite (`weft.testing.transports`) asks about.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from weft.contracts import SEGMENT, Bucket, Capabilities, Message, TransferProgram, Transport
from weft.errors import ConfigError, PeerLostError, TransportError
from weft.member import Region, Tag
from weft.options import parse, tag_of
from weft.plugins import transports_with
from weft.records import decoded

NOTE_LIMIT_BYTES = 4096
"""Longest note of a bucket."""
SIGNAL_LIMIT_BYTES = 65536
"""Longest note of a signal."""
EARLY_LIMIT = 4096
"""Most messages kept for a sender that this side has not connected to yet."""
_FAULTS_SHOWN = 20
_RELEASED_KEPT = 4

Options = TypeVar("Options", bound=msgspec.Struct)
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Factory:
    """`weft.contracts.TransportFactory` of a class: `factory = Factory(Mine, transport_api=1, options=MyOptions)`."""

    make: Callable[[Any], Transport]
    transport_api: int
    options: type[msgspec.Struct] | None = None
    """Its options: a documented struct (`weft.options`) whose tag, in the field `name`, is the plug-in's name; `make`
    gets one. Without it `make` gets the mapping as it was given.
    """

    def __call__(self, options: Mapping[str, Any]) -> Transport:
        """What `make` makes of the options. Raises `ConfigError` with everything that is wrong with them."""
        if self.options is None:
            return self.make(options)
        return self.make(parse_options(self.options, options, str(tag_of(self.options))))


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A message as transports write it on the wire (msgpack)."""

    tag: Tag
    bucket: int | None
    note: bytes
    program: bytes = b""
    """Key of the program that `bucket` belongs to; empty for signals."""


def encode(tag: Tag, bucket: int | None, note: bytes, program: bytes = b"") -> bytes:
    """Bytes of one message. Raises `ConfigError` when the note is too long."""
    limit = SIGNAL_LIMIT_BYTES if bucket is None else NOTE_LIMIT_BYTES
    if len(note) > limit:
        kind = "a signal" if bucket is None else f"bucket {bucket}"
        raise ConfigError(f"the note of {kind} has {len(note)} bytes, at most {limit} are allowed: send less")
    return msgspec.msgpack.encode(Envelope(tag, bucket, note, program))


def decode(wire: bytes, peer: str) -> Envelope:
    """Inverse of `encode`. Raises `RecordError` that names the peer."""
    return decoded(Envelope, wire, f"{peer} sent {len(wire)} bytes that are not a message of weft")


def parse_options(kind: type[Options], options: Mapping[str, Any], transport: str) -> Options:
    """Options of a transport as a typed struct. Raises `ConfigError` with everything that is wrong with them."""
    return parse(kind, options, f"transport {transport!r}", transports_with)


class RegionBook:
    """The regions that are registered with one endpoint: one per allocation, never overlapping (trap 31)."""

    def __init__(self, transport: str, capabilities: Capabilities) -> None:
        self._transport, self._capabilities = transport, capabilities
        self._regions: dict[tuple[str, int], Region] = {}
        self._addresses: dict[str, list[int]] = {}  # by device, ascending

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions.values())

    def __len__(self) -> int:
        return len(self._regions)

    def check(self, region: Region) -> None:
        """Raise `ConfigError` when the region cannot be registered: shape, device, overlap with a registered one."""
        memory = region.memory
        what = f"region {region.name!r} ({memory.dtype}, shape {tuple(memory.shape)}, on {memory.device})"
        if memory.dim() != 1 or memory.element_size() != 1 or not memory.is_contiguous() or memory.numel() == 0:
            raise ConfigError(f"{what} must be a dense one-dimensional uint8 tensor with at least one byte")
        if region.device.type not in self._capabilities.devices:
            allowed = ", ".join(self._capabilities.devices)
            raise ConfigError(f"{what} cannot be registered: transport {self._transport!r} reaches {allowed}")
        addresses = self._addresses.get(str(region.device), [])
        at = bisect.bisect_left(addresses, region.address)
        for address in addresses[max(0, at - 1) : at + 1]:  # registered ones do not overlap: the nearest are enough
            other = self._regions[str(region.device), address]
            if other.address < region.address + region.nbytes and region.address < other.address + other.nbytes:
                raise ConfigError(
                    f"{what} at {region.address:#x}+{region.nbytes} overlaps the registered {other.name!r} at "
                    f"{other.address:#x}+{other.nbytes}: register every allocation once, whole"
                )

    def add(self, region: Region) -> None:
        """Note a region as registered; `check` it first."""
        self._regions[str(region.device), region.address] = region
        bisect.insort(self._addresses.setdefault(str(region.device), []), region.address)

    def remove(self, region: Region) -> bool:
        """Forget it; whether it was there."""
        found = self._regions.pop((str(region.device), region.address), None) is not None
        if found:
            self._addresses[str(region.device)].remove(region.address)
        return found

    def find(self, device: str, address: int, nbytes: int) -> Region | None:
        """The region of exactly this place and size."""
        region = self._regions.get((device, address))
        return region if region is not None and region.nbytes == nbytes else None


def check_program(program: TransferProgram, book: RegionBook, capabilities: Capabilities) -> None:
    """Raise `ConfigError` with every fault: regions not registered, segments outside regions, too many segments."""
    faults: list[str] = []
    for index, region in enumerate(program.regions):
        if book.find(str(region.device), region.address, region.nbytes) is None:
            faults.append(f"region {index} ({region.name!r}, {region.nbytes} bytes) is not registered")
    local_sizes = [region.nbytes for region in program.regions]
    for way, buckets in (("sends", program.sends), ("receives", program.receives)):
        seen: set[int] = set()
        for bucket in buckets:
            where = f"{way}, bucket {bucket.index} with {bucket.peer}"
            if bucket.index in seen:
                faults.append(f"{where}: the index appears twice")
            seen.add(bucket.index)
            remote_sizes = [region.nbytes for region in program.remote_regions.get(bucket.peer, ())]
            for fault in _bucket_faults(bucket, local_sizes, remote_sizes, capabilities):
                faults.append(f"{where}: {fault}")
    if faults:
        more = [f"and {len(faults) - _FAULTS_SHOWN} more"] if len(faults) > _FAULTS_SHOWN else []
        raise ConfigError("the transfer program is invalid: " + "; ".join([*faults[:_FAULTS_SHOWN], *more]))


def _bucket_faults(bucket: Bucket, local: list[int], remote: list[int], capabilities: Capabilities) -> Iterator[str]:
    segments = bucket.segments
    if segments.dtype != SEGMENT or segments.ndim != 1:
        yield f"segments are {segments.dtype} of {segments.ndim} dimensions, expected one dimension of SEGMENT"
        return
    if len(segments) > capabilities.max_segments:
        yield f"{len(segments)} segments, at most {capabilities.max_segments}"
    ends = (("local", local, "region", "offset"), ("remote", remote, "remote_region", "remote_offset"))
    for side, sizes, region, offset in ends:
        index, start, nbytes = segments[region], segments[offset], segments["nbytes"]
        known = (index >= 0) & (index < len(sizes))
        size = np.asarray([*sizes, 0], dtype=np.int64)[np.where(known, index, len(sizes))]
        inside = (start >= 0) & (nbytes >= 0) & (start + nbytes <= size)
        for row in np.flatnonzero(~(known & inside)).tolist():
            extent = f"of {size[row]} bytes" if known[row] else f"(there are {len(sizes)})"
            asked = f"bytes {start[row]}:{start[row] + nbytes[row]}"
            yield f"segment {row}: {side} {asked} outside region {index[row]} {extent}"


class Programs(Generic[Made]):
    """What an endpoint has made of the programs that it was given, by their keys, and of the last few released ones:
    what still comes for those is not waited for.
    """

    def __init__(self) -> None:
        self._made: dict[bytes, Made] = {}
        self._released: dict[bytes, Made | None] = {}

    def add(self, key: bytes, made: Made) -> None:
        """A program is prepared, perhaps again."""
        self._released.pop(key, None)
        self._made[key] = made

    def release(self, key: bytes, made: Made, *, keep: bool) -> bool:
        """It is not used any more. Whether it was. Views of memory that should be let go must not be kept."""
        if self._made.get(key) is not made:
            return False
        del self._made[key]
        self._released[key] = made if keep else None
        if len(self._released) > _RELEASED_KEPT:
            del self._released[next(iter(self._released))]
        return True

    def made(self, key: bytes) -> Made | None:
        """Of a program that is prepared."""
        return self._made.get(key)

    def kept(self, key: bytes) -> Made | None:
        """Of a program that was released lately, and not prepared again."""
        return self._released.get(key)

    def released(self, key: bytes) -> bool:
        """Whether a program was released lately, and not prepared again."""
        return key in self._released


class Inbox:
    """What has arrived and who was lost, until `Transport.poll` asks. Safe to use from several threads.

    Senders are known by an *identity* that is unique to one life of their endpoint, so that what a replaced life still
    sends is dropped (trap 64), and what a peer sends before this side has connected is kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peers: dict[str, str] = {}  # identity -> member name
        self._early: dict[str, list[Envelope]] = {}
        self._retired: set[str] = set()
        self._messages: list[Message] = []
        self._losses: list[PeerLostError] = []
        self._lost: set[str] = set()
        self._stirred = threading.Event()

    def admit(self, peer: str, identity: str) -> None:
        """From now on messages of `identity` are `peer`'s; those that came earlier are delivered."""
        with self._lock:
            self._retired.discard(identity)
            self._lost.discard(peer)
            self._peers[identity] = peer
            self._messages.extend(_message(peer, envelope) for envelope in self._early.pop(identity, ()))

    def expel(self, peer: str) -> None:
        """Nothing of `peer` is delivered any more, what has arrived included."""
        with self._lock:
            for identity in [identity for identity, name in self._peers.items() if name == peer]:
                del self._peers[identity]
                self._retired.add(identity)
            self._messages = [message for message in self._messages if message.peer != peer]
            self._losses = [loss for loss in self._losses if loss.peer != peer]

    def deliver(self, identity: str, envelope: Envelope) -> None:
        """Queue a message, or keep it until `identity` is admitted, or drop it when that life is over."""
        with self._lock:
            if identity in self._peers:
                self._messages.append(_message(self._peers[identity], envelope))
            elif identity not in self._retired:
                early = self._early.setdefault(identity, [])
                if len(early) >= EARLY_LIMIT:
                    raise TransportError(f"{identity} sent over {EARLY_LIMIT} messages before this side connected")
                early.append(envelope)
        self.stir()

    def lose(self, error: PeerLostError) -> None:
        """Report a peer as gone, once until it is admitted again."""
        with self._lock:
            if error.peer not in self._lost:
                self._lost.add(error.peer)
                self._losses.append(error.again())
        self.stir()

    def stir(self) -> None:
        """End a `wait`, now or the next one."""
        self._stirred.set()

    def wait(self, seconds: float) -> None:
        """Until something has arrived, somebody was lost or `stir` was called since the last wait, or for `seconds`."""
        self._stirred.wait(seconds)
        self._stirred.clear()

    def stirred(self) -> bool:
        """Whether a `wait` would return at once now; the next one does not for the same reason."""
        stirred = self._stirred.is_set()
        self._stirred.clear()
        return stirred

    def drain(self) -> list[Message]:
        """Everything that has arrived; when there is nothing, raises the oldest loss not yet reported."""
        with self._lock:
            messages, self._messages = self._messages, []
            if not messages and self._losses:
                raise self._losses.pop(0)
            return messages


def _message(peer: str, envelope: Envelope) -> Message:
    return Message(peer, envelope.tag, envelope.bucket, envelope.note)
