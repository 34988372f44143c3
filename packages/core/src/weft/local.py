"""The `local` transport: members are threads, or mere objects, of one process. The contract in its shortest form."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from weft.contracts import Bucket, Capabilities, Event, Message, Prepared, Stream, TransferProgram, Work
from weft.deadline import Deadline
from weft.endpoint import Envelope, Factory, Inbox, RegionBook, check_program, encode
from weft.errors import ConfigError, PeerLostError, TransportError
from weft.member import Member, Region, Tag
from weft.records import decoded

CAPABILITIES = Capabilities(
    one_sided=True, devices=("cpu",), members_may_change=True, direct_run_bytes=1, max_segments=1 << 20
)


class LocalHub:
    """Where the endpoints of one process find each other: made once, given to each of them as option `hub`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._endpoints: dict[str, LocalTransport] = {}

    def enter(self, identity: str, endpoint: LocalTransport) -> None:
        """Make an endpoint reachable."""
        with self._lock:
            self._endpoints[identity] = endpoint

    def leave(self, identity: str) -> None:
        """Make it unreachable."""
        with self._lock:
            self._endpoints.pop(identity, None)

    def find(self, identity: str) -> LocalTransport | None:
        """The endpoint, unless it has closed."""
        with self._lock:
            return self._endpoints.get(identity)


def make(options: Mapping[str, Any]) -> LocalTransport:
    """A `local` transport; its one option is `hub`, a `LocalHub`."""
    unknown = sorted(set(options) - {"hub"})
    if unknown:
        raise ConfigError(f"transport 'local' has no option {', '.join(unknown)}; it has hub")
    if not isinstance(options.get("hub"), LocalHub):
        raise ConfigError(f"transport 'local' needs the option hub=weft.local.LocalHub(), not {options.get('hub')!r}")
    return LocalTransport(options["hub"])


@dataclass(frozen=True, slots=True)
class LocalRegistration:
    """Memory that peers of the same hub may write."""

    region: Region


@dataclass(frozen=True, slots=True)
class LocalPrepared:
    """A checked program. Nothing about it depends on an earlier connection."""

    program: TransferProgram
    sends: Mapping[int, Bucket]
    busy: set[int]
    """Buckets with an active post."""


@dataclass(slots=True, eq=False)
class LocalWork:
    """One posted bucket: copied by the first `advance` that finds its event reached."""

    transport: LocalTransport
    prepared: LocalPrepared
    bucket: Bucket
    envelope: Envelope
    after: Event | None
    finished: bool = False
    error: TransportError | None = None

    def advance(self) -> bool:
        """Whether there is nothing left to do."""
        if not self.finished and (self.after is None or self.after.query()):
            self.cancel()
            try:
                self.transport.copy(self.prepared.program, self.bucket, self.envelope)
            except TransportError as error:
                self.error = error.again()
        return self.finished

    def poll(self) -> bool:
        """Whether the bytes have been copied; raises what prevented it."""
        finished = self.advance()
        if self.error is not None:
            raise self.error.again()
        return finished

    def cancel(self) -> None:
        """Give it up."""
        self.finished = True
        self.prepared.busy.discard(self.bucket.index)


class LocalTransport:
    """`weft.contracts.Transport` by memcpy. Every endpoint may have its own thread."""

    capabilities = CAPABILITIES

    def __init__(self, hub: LocalHub) -> None:
        self._hub = hub
        self._identity = ""
        self._closed = False
        self._inbox = Inbox()
        self._regions = RegionBook("local", CAPABILITIES)
        self._peers: dict[str, str] = {}  # member name -> identity of its endpoint
        self._waiting: list[LocalWork] = []

    def open(self, member: Member) -> None:
        """Enter the hub."""
        if self._identity:
            raise TransportError(f"transport 'local' of {member.name} is open already: open once")
        self._identity = f"{member.name}#{member.incarnation}/{uuid.uuid4().hex}"
        self._hub.enter(self._identity, self)

    def register(self, region: Region, deadline: Deadline) -> LocalRegistration:
        """Let peers write this memory."""
        self._require_open()
        self._regions.check(region)
        self._regions.add(region)
        return LocalRegistration(region)

    def deregister(self, registration: Any) -> None:
        """Peers that write it afterwards get an error."""
        self._regions.remove(registration.region)

    def address(self) -> bytes:
        """The identity of this endpoint in its hub."""
        self._require_open()
        return msgspec.msgpack.encode(self._identity)

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """Find a peer in the hub. Raises `PeerLostError` when it has closed."""
        self._require_open()
        identity = decoded(str, address, f"the address of {peer.name} is none of transport 'local'")
        if self._hub.find(identity) is None:
            raise PeerLostError(peer.name, f"no endpoint {identity} in this hub")
        if self._peers.get(peer.name) != identity:
            self.disconnect(peer.name)
        self._peers[peer.name] = identity
        self._inbox.admit(peer.name, identity)

    def disconnect(self, peer: str) -> None:
        """Forget a peer."""
        if self._peers.pop(peer, None) is not None:
            self._inbox.expel(peer)

    def prepare(self, program: TransferProgram, deadline: Deadline) -> LocalPrepared:
        """Check the program; `ConfigError` has every fault."""
        self._require_open()
        check_program(program, self._regions, CAPABILITIES)
        return LocalPrepared(program, {bucket.index: bucket for bucket in program.sends}, set())

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Copy now, or, when `after` is not reached yet, in a later `poll`."""
        self._require_open()
        if not isinstance(prepared, LocalPrepared) or bucket not in prepared.sends:
            raise ConfigError(f"bucket {bucket} is none of the prepared sends of this transport")
        if bucket in prepared.busy:
            raise TransportError(f"bucket {bucket} has an active post: wait for its work before posting it again")
        encode(tag, bucket, note)
        work = LocalWork(self, prepared, prepared.sends[bucket], Envelope(tag, bucket, note), after)
        prepared.busy.add(bucket)
        if not work.advance():
            self._waiting.append(work)
        return work

    def copy(self, program: TransferProgram, bucket: Bucket, envelope: Envelope) -> None:
        """Write a bucket's segments into the peer's memory and tell it. Raises `PeerLostError` when it has closed."""
        peer = self._reach(bucket.peer)
        remote_regions = program.remote_regions.get(bucket.peer, ())
        targets = [peer._regions.find(remote.device, remote.address, remote.nbytes) for remote in remote_regions]
        for region, offset, remote_region, remote_offset, nbytes in bucket.segments.tolist():
            target = targets[remote_region]
            if target is None:
                raise TransportError(f"{remote_regions[remote_region]} is not registered by {bucket.peer} any more")
            source = program.regions[region].memory[offset : offset + nbytes]
            target.memory[remote_offset : remote_offset + nbytes].copy_(source)
        peer._inbox.deliver(self._identity, envelope)

    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """Put a message into the peer's inbox."""
        self._require_open()
        encode(tag, None, note)
        self._reach(peer)._inbox.deliver(self._identity, Envelope(tag, None, note))

    def poll(self) -> Sequence[Message]:
        """What arrived; also starts posts whose event has been reached."""
        self._require_open()
        self._waiting = [work for work in self._waiting if not work.advance()]
        for peer, identity in self._peers.items():
            if self._hub.find(identity) is None:
                self._inbox.lose(PeerLostError(peer, "its endpoint has closed"))
        return self._inbox.drain()

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """Nothing to do: a message is delivered after the copy."""

    def release(self, prepared: Prepared) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Leave the hub."""
        self._hub.leave(self._identity)
        self._closed = True
        self._waiting.clear()

    def _require_open(self) -> None:
        if self._closed or not self._identity:
            raise TransportError(f"transport 'local' is {'closed' if self._closed else 'not open yet'}")

    def _reach(self, peer: str) -> LocalTransport:
        found = self._hub.find(self._peers.get(peer, ""))
        if found is None:
            raise PeerLostError(peer, "its endpoint has closed" if peer in self._peers else "not connected")
        return found


factory = Factory(make, transport_api=1)
