"""The `nixl` transport: `weft.contracts.Transport` by one-sided writes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec

from weft.contracts import Capabilities, Event, Message, Prepared, Stream, TransferProgram, Work
from weft.deadline import Deadline
from weft.endpoint import Inbox, RegionBook, check_program, decode, encode
from weft.errors import ConfigError, DeadlineError, PeerLostError, RecordError, TransportError
from weft.member import Member, Region, Tag
from weft.records import decoded
from weft_nixl.environment import ucx_variables
from weft_nixl.library import FOREIGN, make_agent, translated
from weft_nixl.nics import choose_nics
from weft_nixl.options import NixlOptions, backend_parameters
from weft_nixl.pinning import CudaSegments, refuse_expandable
from weft_nixl.transfers import MEMORY, Lane, NixlPrepared, NixlWork, prepare_sends
from weft_nixl.visibility import flush_inbound_writes

_LOG = logging.getLogger(__name__)

CAPABILITIES = Capabilities(
    one_sided=True,
    devices=("cpu", "cuda"),
    members_may_change=True,
    direct_run_bytes=16 << 10,
    max_segments=65536,
)

Method = TypeVar("Method", bound=Callable[..., Any])

_PROBE = b"?"
"""A notification that means nothing: sending it fails when the peer is gone."""
_FAREWELL = b"."
"""The last word of who closes, and the answer to it: everything that was sent before is here."""
_POLL_SECONDS = 1e-3
_LINGER_SECONDS = 1.0
"""Longest wait for the answers. NIXL would drop what has not left when an agent ends."""


class Address(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs."""

    identity: str
    """Name of the agent, unique to this life of the endpoint."""
    metadata: bytes
    """NIXL's: how to connect, and every region registered so far."""


@dataclass(slots=True, eq=False)
class NixlRegistration:
    """Registered memory."""

    region: Region
    descriptors: Any
    """NIXL's, or None after deregistration."""


@dataclass(slots=True, eq=False)
class _Peer:
    address: Address
    lane: Lane
    lost: bool = False


def _locked(method: Method) -> Method:
    """Keep the transport's own thread out while the method runs."""

    @functools.wraps(method)
    def guarded(self: NixlTransport, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            try:
                return method(self, *args, **kwargs)
            finally:
                self._called_at = time.monotonic()

    return cast(Method, guarded)


class NixlTransport:
    """One NIXL agent. The caller's polls move everything at full speed.

    Notifications leave, connections form and bytes are taken in (over networks without RDMA) only when somebody calls
    NIXL. So while the caller is busy elsewhere a thread of the transport does, some hundred times a second: peers never
    wait for this side to poll. NIXL's own progress thread would do it too, for the price of a core.
    """

    capabilities = CAPABILITIES

    def __init__(self, options: NixlOptions) -> None:
        self._options = options
        self._agent: Any = None
        self._closed = False
        self._identity = ""
        self._regions = RegionBook("nixl", CAPABILITIES)
        self._registrations: list[NixlRegistration] = []
        self._prepared: list[NixlPrepared] = []
        self._peers: dict[str, _Peer] = {}
        self._inbox = Inbox()
        self._segments = CudaSegments()
        self._next_probe = 0.0
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._called_at = 0.0
        self._faults: list[RecordError | TransportError] = []
        self._closing = False

    @_locked
    def open(self, member: Member) -> None:
        """Create the agent and its backends (0.5 s). Raises `ConfigError` for NICs that are not there."""
        if self._agent is not None or self._closed:
            raise TransportError(f"transport 'nixl' of {member.name} is {'closed' if self._closed else 'open already'}")
        self._identity = f"{member.name}#{member.incarnation}/{uuid.uuid4().hex}"
        variables = ucx_variables(self._options, choose_nics(self._options, member))
        self._agent = make_agent(
            self._identity, backend_parameters(self._options), self._options.progress_thread, variables
        )
        self._thread = threading.Thread(target=self._run, name=f"weft-nixl {member.name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that is inside NIXL when the interpreter goes aborts the process

    @_locked
    def register(self, region: Region, deadline: Deadline) -> NixlRegistration:
        """Register a whole allocation. Raises `ConfigError` for memory that overlaps or that RDMA cannot register."""
        self._require_open()
        self._regions.check(region)
        refuse_expandable(region, self._segments.around(region.device))
        row = (region.address, region.nbytes, region.device.index or 0, "")
        with translated(f"registering region {region.name!r} ({region.nbytes} bytes on {region.device})"):
            descriptors = self._agent.register_memory([row], MEMORY[region.device.type])
        if descriptors is None:
            raise TransportError(f"NIXL takes no descriptor of region {region.name!r} ({region.nbytes} bytes)")
        self._regions.add(region)
        registration = NixlRegistration(region, descriptors)
        self._registrations.append(registration)
        return registration

    @_locked
    def deregister(self, registration: Any) -> None:
        """Undo `register`. Programs that use the region must have been released."""
        if self._agent is not None and registration.descriptors is not None:
            descriptors, registration.descriptors = registration.descriptors, None
            self._registrations.remove(registration)
            self._regions.remove(registration.region)
            with translated(f"deregistering region {registration.region.name!r}"):
                self._agent.deregister_memory(descriptors)

    @_locked
    def address(self) -> bytes:
        """Agent name and metadata of everything registered so far."""
        self._require_open()
        with translated("reading the agent's metadata"):
            return msgspec.msgpack.encode(Address(self._identity, self._agent.get_agent_metadata()))

    @_locked
    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """Load a peer's metadata and start connecting. A changed address drops what was prepared for the old one."""
        self._require_open()
        new = decoded(Address, address, f"the address of {peer.name} is none of transport 'nixl'")
        known = self._peers.get(peer.name)
        if known is not None and not known.lost and known.address == new:
            return
        if deadline.expired():
            raise DeadlineError(f"connecting to {peer.name}", deadline.seconds, [peer.name])
        self._detach(peer.name, keep_messages=known is not None and known.address.identity == new.identity)
        try:
            with translated("connecting", peer.name):
                self._agent.add_remote_agent(new.metadata)
                self._agent.make_connection(new.identity)
        except TransportError as error:
            raise PeerLostError(peer.name, f"its agent {new.identity} cannot be reached: {error}") from error
        lane = Lane(self._lock, self._agent, peer.name, new.identity, self._options.depth, self._note_loss)
        self._peers[peer.name] = _Peer(new, lane)
        self._inbox.admit(peer.name, new.identity)

    @_locked
    def disconnect(self, peer: str) -> None:
        """Forget a peer, its prepared buckets included."""
        self._detach(peer, keep_messages=False)

    @_locked
    def prepare(self, program: TransferProgram, deadline: Deadline) -> NixlPrepared:
        """Descriptor lists and a handle per chunk. Raises `PeerLostError` for a receiver that is not connected."""
        self._require_open()
        check_program(program, self._regions, CAPABILITIES)
        receivers = sorted({bucket.peer for bucket in program.sends})
        identities = {name: self._reach(name).address.identity for name in receivers}
        prepared = prepare_sends(self._agent, program, identities, self._options.chunk_segments, deadline)
        self._prepared.append(prepared)
        return prepared

    @_locked
    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Queue a bucket and start what fits into the depth."""
        self._require_open()
        if not isinstance(prepared, NixlPrepared) or bucket not in prepared.sends:
            raise ConfigError(f"bucket {bucket} is no send of this program, or its peer connected anew: prepare again")
        send = prepared.sends[bucket]
        if send.active:
            raise TransportError(f"bucket {bucket} has an active post: wait for its work before posting it again")
        message = encode(tag, bucket, note, prepared.program.key)
        lane = self._reach(send.bucket.peer).lane
        work = NixlWork(lane, send, message, after)
        send.active = True
        lane.works.append(work)
        lane.advance()
        return work

    @_locked
    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """Send a notification of its own."""
        self._require_open()
        message = encode(tag, None, note)
        self._notify(peer, message)

    @_locked
    def poll(self) -> Sequence[Message]:
        """Make progress, and give what arrived. Raises `RecordError` for what is no message of weft."""
        self._require_open()
        self._progress()
        if self._faults:
            raise self._faults.pop(0)
        return self._inbox.drain()

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """Nothing on CPU, where notifications follow the bytes. On CUDA `flush_inbound_writes`, unproven on GPUs."""
        regions = prepared.program.regions
        for received in prepared.program.receives:
            if received.index == bucket:
                for index in sorted({int(region) for region in received.segments["region"]}):
                    flush_inbound_writes(regions[index].device)

    @_locked
    def release(self, prepared: Prepared) -> None:
        """Release handles and descriptor lists; what is still active is cancelled."""
        if isinstance(prepared, NixlPrepared) and prepared in self._prepared:
            self._prepared.remove(prepared)
            for known in self._peers.values():
                for work in list(known.lane.works):
                    if prepared.sends.get(work.send.bucket.index) is work.send:
                        work.cancel()
            for peer in list(prepared.lists):
                prepared.drop(peer)
            prepared.sends.clear()

    def close(self) -> None:
        """Handles, registrations, remote agents, the agent: in this order (trap 31). What was sent arrives before,
        if it can within a second.
        """
        atexit.unregister(self.close)
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._agent is not None:
            self._linger(Deadline.after(_LINGER_SECONDS))
            for prepared in list(self._prepared):
                self.release(prepared)
            for registration in list(self._registrations):
                self.deregister(registration)
            for peer in list(self._peers):
                self._detach(peer, keep_messages=False)
            self._agent = None
        self._closed = True

    def _run(self) -> None:
        """The thread: make progress when the caller has not called for a while."""
        pause_seconds = self._options.idle_progress_seconds
        while not self._stop.wait(pause_seconds):
            with self._lock:
                if time.monotonic() - self._called_at > pause_seconds:
                    self._progress()

    def _progress(self) -> None:
        """Start and finish posts, take in messages, probe. What goes wrong is kept for the next `poll`."""
        for known in list(self._peers.values()):
            known.lane.advance()
        try:
            with translated("reading notifications"):
                arrived = self._agent.get_new_notifs()
            for identity, messages in arrived.items():
                for message in messages:
                    if message == _FAREWELL:
                        self._part(identity)
                    elif message != _PROBE:
                        self._inbox.deliver(identity, decode(message, identity))
            self._probe()
        except (RecordError, TransportError) as error:
            self._faults.append(error)

    def _require_open(self) -> None:
        if self._agent is None:
            raise TransportError(f"transport 'nixl' is {'closed' if self._closed else 'not open yet'}")

    def _reach(self, peer: str) -> _Peer:
        known = self._peers.get(peer)
        if known is None or known.lost:
            raise PeerLostError(peer, "not connected" if known is None else "it was lost earlier; connect again")
        return known

    def _notify(self, peer: str, message: bytes) -> None:
        known = self._reach(peer)
        try:
            with translated("sending a message", peer):
                self._agent.send_notif(known.address.identity, message)
        except PeerLostError as error:
            self._note_loss(error)
            raise

    def _linger(self, deadline: Deadline) -> None:
        """Say farewell and wait for the answers; the deadline is for peers that hang or have never connected."""
        self._closing = True
        self._tell_all(_FAREWELL)
        while not deadline.expired() and any(not known.lost for known in self._peers.values()):
            self._progress()
            time.sleep(_POLL_SECONDS)

    def _part(self, identity: str) -> None:
        """A peer has said farewell, first or in answer."""
        for peer in [name for name, known in self._peers.items() if known.address.identity == identity]:
            if not self._closing:
                with contextlib.suppress(PeerLostError):
                    self._notify(peer, _FAREWELL)
            self._note_loss(PeerLostError(peer, "it has closed"))

    def _tell_all(self, message: bytes) -> None:
        for peer in [name for name, known in self._peers.items() if not known.lost]:
            try:
                self._notify(peer, message)
            except PeerLostError as error:
                _LOG.debug("%s: %s", peer, error)

    def _probe(self) -> None:
        now = time.monotonic()
        if now < self._next_probe:
            return
        self._next_probe = now + self._options.probe_seconds
        self._tell_all(_PROBE)

    def _note_loss(self, error: TransportError) -> None:
        if isinstance(error, PeerLostError):
            known = self._peers[error.peer]
            if not known.lost:
                known.lost = True
                known.lane.fail(error)
                self._inbox.lose(error)

    def _detach(self, peer: str, keep_messages: bool) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        if not keep_messages:
            self._inbox.expel(peer)
        known.lane.fail(PeerLostError(peer, "disconnected"))
        for prepared in self._prepared:
            prepared.drop(peer)
        try:
            self._agent.remove_remote_agent(known.address.identity)
        except FOREIGN as error:
            _LOG.debug("removing %s: %s", known.address.identity, error)
