"""The `nixl` transport: `weft.contracts.Transport` by one-sided writes or reads."""

from __future__ import annotations

import atexit
import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import msgspec

from weft.contracts import Capabilities, Event, Message, Prepared, Stream, TransferProgram, Work
from weft.deadline import Deadline
from weft.endpoint import Inbox, RegionBook, check_program, encode
from weft.errors import ConfigError, DeadlineError, PeerLostError, RecordError, TransportError
from weft.expandable import CudaSegments, refuse_expandable
from weft.member import Member, Region, Tag
from weft.records import decoded
from weft_nixl.environment import ucx_variables
from weft_nixl.library import make_agent, translated
from weft_nixl.mover import Mover
from weft_nixl.nics import choose_nics
from weft_nixl.options import NixlOptions, backend_parameters
from weft_nixl.peers import Address, Peer, Peers
from weft_nixl.pull import Pull
from weft_nixl.push import Push
from weft_nixl.transfers import MEMORY, NixlPrepared
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

_LINGER_SECONDS = 1.0
"""Longest wait of `close` for the peers' farewells (NIXL would drop what has not left when an agent ends), and for
reads that are in flight.
"""
_POLL_SECONDS = 1e-3
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 20e-6, 1e-3
"""Between looks for what has happened, a little longer each time."""
_RELEASE_SECONDS = 5.0
"""Longest wait of `release` for reads that are in flight; only those from a peer that hangs take so long."""


@dataclass(slots=True, eq=False)
class NixlRegistration:
    """Registered memory."""

    region: Region
    descriptors: Any
    """NIXL's, or None after deregistration."""


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

    def __init__(self, options: NixlOptions) -> None:
        self._options = options
        self.capabilities = replace(CAPABILITIES, one_sided=options.direction == "push")
        self._agent: Any = None
        self._used: tuple[Peers, Mover] | None = None
        self._closed = False
        self._name, self._identity = "", ""
        self._regions = RegionBook("nixl", CAPABILITIES)
        self._registrations: list[NixlRegistration] = []
        self._prepared: list[NixlPrepared] = []
        self._inbox = Inbox()
        self._segments = CudaSegments()
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._called_at = 0.0
        self._faults: list[RecordError | TransportError] = []

    @_locked
    def open(self, member: Member) -> None:
        """Create the agent and its backends (0.5 s). Raises `ConfigError` for NICs that are not there."""
        if self._agent is not None or self._closed:
            raise TransportError(f"transport 'nixl' of {member.name} is {'closed' if self._closed else 'open already'}")
        self._name, self._identity = member.name, f"{member.name}#{member.incarnation}/{uuid.uuid4().hex}"
        variables = ucx_variables(self._options, choose_nics(self._options, member))
        self._agent = make_agent(
            self._identity, backend_parameters(self._options), self._options.progress_thread, variables
        )
        peers = Peers(self._agent, self._lock, self._inbox, self._options, self._lose)
        pulls = self._options.direction == "pull"
        self._used = peers, Pull(peers, self._inbox, self._lock) if pulls else Push(peers, self._inbox)
        self._thread = threading.Thread(target=self._run, name=f"weft-nixl {member.name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that is inside NIXL when the interpreter goes aborts the process

    @_locked
    def register(self, region: Region, deadline: Deadline) -> NixlRegistration:
        """Register a whole allocation. Raises `ConfigError` for memory that overlaps or that RDMA cannot register."""
        self._require_open()
        self._regions.check(region)
        refuse_expandable(region, self._segments.around(region.device), "RDMA cannot pin")
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
            metadata = self._agent.get_agent_metadata()
        return msgspec.msgpack.encode(Address(self._identity, metadata, self._options.direction))

    @_locked
    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """Load a peer's metadata and start connecting. A changed address drops what was prepared for the old one.

        Raises `ConfigError` for a peer that moves bytes in another direction.
        """
        peers, mover = self._require_open()
        new = decoded(Address, address, f"the address of {peer.name} is none of transport 'nixl'")
        if new.direction != self._options.direction:
            raise ConfigError(
                f"transport 'nixl': direction is {self._options.direction!r} at {self._name}, {new.direction!r} at "
                f"{peer.name}: give all members the same"
            )
        known = peers.find(peer.name)
        if known is not None and not known.lost and known.address == new:
            return
        if deadline.expired():
            raise DeadlineError(f"connecting to {peer.name}", deadline.seconds, [peer.name])
        self._leave(peer.name, returns=known is not None and known.identity == new.identity)
        mover.arrive(peers.add(peer.name, new, deadline))

    @_locked
    def disconnect(self, peer: str) -> None:
        """Forget a peer, its prepared buckets included."""
        self._leave(peer, returns=False)

    @_locked
    def prepare(self, program: TransferProgram, deadline: Deadline) -> NixlPrepared:
        """Descriptor lists and a handle per chunk, at the end that moves the bytes. Raises `PeerLostError` for a peer
        that is not connected.
        """
        _, mover = self._require_open()
        check_program(program, self._regions, CAPABILITIES)
        prepared = mover.prepare(self._agent, program, self._options.chunk_segments, deadline)
        self._prepared.append(prepared)
        return prepared

    @_locked
    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Queue a bucket and start what fits into the depth, or offer it to its receiver."""
        _, mover = self._require_open()
        if not isinstance(prepared, NixlPrepared) or bucket not in prepared.sends:
            raise ConfigError(f"bucket {bucket} is no send of this program, or its peer connected anew: prepare again")
        send = prepared.sends[bucket]
        if send.active:
            raise TransportError(f"bucket {bucket} has an active post: wait for its work before posting it again")
        return mover.post(send, tag, note, after)

    @_locked
    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """Send a notification of its own."""
        peers, _ = self._require_open()
        peers.notify(peer, encode(tag, None, note))

    @_locked
    def poll(self) -> Sequence[Message]:
        """Make progress, and give what arrived. Raises `RecordError` for what is no message of weft."""
        self._require_open()
        self._progress()
        if self._faults:
            raise self._faults.pop(0)
        return self._inbox.drain()

    def wait(self, seconds: float) -> None:
        """Until something has arrived, left or broken. NIXL only says so when it is asked: this asks again and again,
        which takes less of a processor than polls by a caller who steps everything else as well.
        """
        limit, pause_seconds = Deadline.after(seconds), _FIRST_PAUSE_SECONDS
        while not (self._inbox.stirred() or limit.expired()):
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            self._look()

    @_locked
    def _look(self) -> None:
        self._progress()

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """Nothing on CPU, where notifications follow the bytes. On CUDA `flush_inbound_writes`, unproven on GPUs."""
        if isinstance(prepared, NixlPrepared):
            for device in prepared.flushed.get(bucket, ()):
                flush_inbound_writes(device)

    @_locked
    def release(self, prepared: Prepared) -> None:
        """Release handles and descriptor lists; what is still active is given up.

        Reads that are in flight are waited for, since they write into this side's memory, and it must not be used for
        anything else before. Raises `DeadlineError` when one has not ended in time, because its peer hangs; then close
        the transport, or try again.
        """
        if isinstance(prepared, NixlPrepared) and prepared in self._prepared:
            self._release(prepared, Deadline.after(_RELEASE_SECONDS))

    def _release(self, prepared: NixlPrepared, deadline: Deadline) -> None:
        peers, mover = self._require_open()
        mover.release(prepared)
        for lane in peers.lanes():
            for transfer in list(lane.transfers):
                if transfer.moved.program is prepared.program:
                    lane.give_up(transfer, None)

        def moving() -> list[str]:
            lanes = (lane for lane in peers.lanes() if any(t.moved.program is prepared.program for t, _ in lane.flight))
            return sorted(lane.peer for lane in lanes)

        def ended() -> bool:
            self._progress()
            return not moving()

        deadline.wait(ended, "ending reads that are in flight", moving)
        self._prepared.remove(prepared)
        prepared.drop()

    def close(self) -> None:
        """Handles, registrations, remote agents, the agent: in this order (trap 31). What was sent arrives before,
        if it can within a second.
        """
        atexit.unregister(self.close)
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._used is not None:
            with self._lock:
                self._end(*self._used)
        self._closed = True

    def _end(self, peers: Peers, mover: Mover) -> None:
        limit = Deadline.after(_LINGER_SECONDS)
        peers.say_farewell()
        while not limit.expired() and peers.present:
            self._progress()
            time.sleep(_POLL_SECONDS)
        limit = Deadline.after(_LINGER_SECONDS)
        for prepared in list(self._prepared):
            try:
                self._release(prepared, limit)
            except DeadlineError as error:
                _LOG.warning("transport 'nixl' of %s closes nevertheless: %s", self._name, error)
        for peer in peers.everybody():
            mover.leave(peer, returns=False)
        peers.abort()
        for prepared in self._prepared:
            prepared.drop()
        for registration in list(self._registrations):
            self.deregister(registration)
        for peer in peers.everybody():
            self._leave(peer.name, returns=False)
        self._prepared, self._used, self._agent = [], None, None

    def _run(self) -> None:
        """The thread: make progress when the caller has not called for a while."""
        pause_seconds = self._options.idle_progress_seconds
        while not self._stop.wait(pause_seconds):
            if self._lock.acquire(blocking=False):  # else somebody makes progress
                try:
                    if time.monotonic() - self._called_at > pause_seconds:
                        self._progress()
                finally:
                    self._lock.release()

    def _progress(self) -> None:
        """Start and finish posts, take in messages, probe. What goes wrong is kept for the next `poll`."""
        if self._used is None:
            return
        peers, mover = self._used
        peers.advance()
        mover.advance()
        self._guard(self._take_in)
        self._guard(peers.part)
        self._guard(peers.probe)

    def _take_in(self) -> None:
        peers, mover = self._require_open()
        with translated("reading notifications"):
            arrived = self._agent.get_new_notifs()
        for identity, messages in arrived.items():
            for message in messages:
                if peers.hear(identity, message):
                    self._inbox.stir()
                    self._guard(mover.hear, identity, message)

    def _guard(self, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except (RecordError, TransportError) as error:
            self._faults.append(error)
            self._inbox.stir()

    def _require_open(self) -> tuple[Peers, Mover]:
        if self._used is None:
            raise TransportError(f"transport 'nixl' is {'closed' if self._closed else 'not open yet'}")
        return self._used

    def _lose(self, peer: Peer, error: PeerLostError) -> None:
        self._require_open()[1].lose(peer, error)

    def _leave(self, name: str, *, returns: bool) -> None:
        known = self._used[0].find(name) if self._used is not None else None
        if self._used is not None and known is not None:
            peers, mover = self._used
            mover.leave(known, returns=returns)
            peers.leave(known, [prepared.forget(name) for prepared in self._prepared], keep_messages=returns)
