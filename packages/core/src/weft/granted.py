"""Transports over networks whose two ends must act together: `weft.contracts.Transport` by turns that receivers grant.

A plug-in brings a `weft.networks.Network`; control connections (`weft.control`), turns (`weft.turns`), batches
(`weft.batches`) and the thread that drives them (`weft.exchange`) are core's.
"""

from __future__ import annotations

import atexit
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from weft.authentication import Key
from weft.batches import Batch, Limits, batches_of
from weft.contracts import Bucket, Capabilities, Event, Message, Prepared, Stream, TransferProgram, Work
from weft.control import Control
from weft.deadline import Deadline
from weft.endpoint import Envelope, Programs, RegionBook, check_program, encode
from weft.errors import ConfigError, RecordError, TransportError
from weft.exchange import Exchange
from weft.hosts import check_reachable
from weft.member import Member, Region, Tag
from weft.networks import Network
from weft.passages import Post
from weft.records import decoded


class Address(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs."""

    network: str
    """The transport, and `Network.kind`."""
    identity: str
    """Unique to this life of the endpoint."""
    host: str
    port: int
    limits: tuple[int, int, int, int]
    """Fields of `weft.batches.Limits`, which must be equal everywhere (trap 42)."""


@dataclass(frozen=True, slots=True)
class GrantedRegistration:
    """Memory that may be sent from and received into."""

    region: Region


@dataclass(frozen=True, slots=True, eq=False)
class GrantedPrepared:
    """A program's buckets as batches."""

    program: TransferProgram
    sends: Mapping[int, tuple[Bucket, Sequence[Batch]]]
    receives: Mapping[int, tuple[Bucket, Sequence[Batch]]]
    active: dict[int, GrantedWork]
    """The last post of every bucket."""


@dataclass(frozen=True, slots=True, eq=False)
class GrantedWork:
    """One posted bucket."""

    exchange: Exchange
    bucket: Post

    def poll(self) -> bool:
        """Whether the bytes are in place over there; raises what prevented it, again and again."""
        if self.bucket.error is not None:
            raise self.bucket.error.again()
        return self.bucket.done

    def cancel(self) -> None:
        """Give it up. A bucket whose turn is under way is sent to its end."""
        self.exchange.cancel(self.bucket)


class GrantedTransport:
    """One endpoint."""

    def __init__(
        self,
        name: str,
        network: Network,
        capabilities: Capabilities,
        limits: Limits,
        places: int,
        choose_host: Callable[[Member], str],
    ) -> None:
        """`name` is the transport's; `places` how many turns an end may have at once, either way."""
        self.capabilities = capabilities
        self._name, self._network, self._limits, self._places = name, network, limits, places
        self._choose_host = choose_host
        self._own: tuple[Member, Address] | None = None
        self._closed = False
        self._key: Key | None = None
        self._device = torch.device("cpu")
        self._regions = RegionBook(name, capabilities)
        self._addresses: dict[str, Address] = {}
        self._programs: Programs[GrantedPrepared] = Programs()
        self._exchange: Exchange | None = None

    def trust(self, key: Key) -> None:
        """Hear nobody over control connections who does not know it."""
        self._key = key

    def open(self, member: Member) -> None:
        """Listen on a free port. Raises `ConfigError` for a host, interface or device that does not exist."""
        if self._own is not None or self._closed:
            state = "closed" if self._closed else "open already"
            raise TransportError(f"transport '{self._name}' of {member.name} is {state}")
        host = self._choose_host(member)
        identity = f"{member.name}#{member.incarnation}/{uuid.uuid4().hex}"
        self._device = self._network.open(member, host)
        try:
            control = Control(identity, host, self._key)
        except OSError as error:
            self._network.close()
            raise TransportError(
                f"transport '{self._name}' of {member.name} cannot listen on {host}: {error}"
            ) from error
        limits = self._limits
        sizes = (limits.batch_bytes, limits.operations, limits.pack_below_bytes, limits.staging_bytes)
        self._own = member, Address(f"{self._name} over {self._network.kind}", identity, host, control.port, sizes)
        self._exchange = Exchange(self._network, control, self._places, self._expected, self._unwanted)
        atexit.register(self.close)  # a thread that the interpreter finds at work when it goes may abort the process

    def register(self, region: Region, deadline: Deadline) -> GrantedRegistration:
        """Note an allocation. Raises `ConfigError` for memory of another device than this member's."""
        self._require_open()
        self._regions.check(region)
        if region.device != self._device:
            raise ConfigError(
                f"region {region.name!r} on {region.device} cannot be registered: transport '{self._name}' of this "
                f"member reaches {self._device}"
            )
        self._regions.add(region)
        return GrantedRegistration(region)

    def deregister(self, registration: Any) -> None:
        """Forget it."""
        self._regions.remove(registration.region)

    def address(self) -> bytes:
        """Where this endpoint listens. Does not depend on regions."""
        return msgspec.msgpack.encode(self._require_open()[1])

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """Start meeting the peer, which must do the same; `prepare` waits for it, until then posts and signals queue.

        So members may connect to each other in any order. Raises `ConfigError` for a loopback address of another host
        and for other sizes of batches.
        """
        member, own, exchange = self._require_open()
        new = decoded(Address, address, f"the address of {peer.name} is none of transport '{self._name}'")
        if new.network != own.network:
            raise RecordError(
                f"the address of {peer.name} is none of transport '{self._name}': it is of {new.network}, this one of "
                f"{own.network}"
            )
        check_reachable(self._name, member.host, own.host, peer.host, new.host)
        if new.limits != own.limits:
            raise ConfigError(
                f"sizes of batches (batch, operations, packed below, staging) are {own.limits} here, {new.limits} at "
                f"{peer.name}: make the options equal"
            )
        if self._addresses.get(peer.name) == new and exchange.reaches(peer.name):
            return
        self._addresses[peer.name] = new
        exchange.connect(peer.name, new.identity, new.host, new.port, dials=member.name < peer.name)

    def disconnect(self, peer: str) -> None:
        """Forget a peer."""
        self._addresses.pop(peer, None)
        if self._exchange is not None:
            self._exchange.disconnect(peer)

    def prepare(self, program: TransferProgram, deadline: Deadline) -> GrantedPrepared:
        """Divide buckets into batches, and wait until every connection is up, for one that is not cannot be seen to
        break, and until the channels that it sends through are made. They are kept for other programs.

        Raises what broke a connection of the program; the loss of another peer is said by `poll`.
        """
        exchange = self._require_open()[2]
        check_program(program, self._regions, self.capabilities)
        sends, receives = self._batches(program, program.sends), self._batches(program, program.receives)
        prepared = GrantedPrepared(program, sends, receives, {})
        to = sorted({bucket.peer for bucket in program.sends})
        by = sorted({bucket.peer for bucket in program.receives})

        def met() -> bool:
            for peer in (*to, *by):
                exchange.check(peer)
            return not exchange.absent()

        deadline.wait(met, "connecting", exchange.absent)
        self._network.meet(deadline)
        for peer in to:
            exchange.invite(peer)
        deadline.wait(lambda: not exchange.unmade(to), "making channels", lambda: exchange.unmade(to))
        self._programs.add(program.key, prepared)
        exchange.wake()
        return prepared

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Queue a bucket for its peer. Without an event it comes after what the caller's current stream still does."""
        exchange = self._require_open()[2]
        if not isinstance(prepared, GrantedPrepared) or bucket not in prepared.sends:
            raise ConfigError(f"bucket {bucket} is no send of this program")
        earlier = prepared.active.get(bucket)
        if earlier is not None and not earlier.bucket.done:
            raise TransportError(f"bucket {bucket} has an active post: wait for its work before posting it again")
        what, batches = prepared.sends[bucket]
        encode(tag, bucket, note)  # refuses a note that is too long
        envelope = Envelope(tag, bucket, note, prepared.program.key)
        event = self._network.reached() if after is None else after
        work = GrantedWork(exchange, Post(what.peer, envelope, batches, event))
        exchange.post(work.bucket)
        prepared.active[bucket] = work
        return work

    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """Send it over the control connection."""
        exchange = self._require_open()[2]
        encode(tag, None, note)  # refuses a note that is too long
        exchange.signal(peer, Envelope(tag, None, note))

    def poll(self) -> Sequence[Message]:
        """What the endpoint's thread has taken in."""
        return self._require_open()[2].inbox.drain()

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """Nothing to do: a bucket is announced after the event behind its last copy, so all later work sees it."""

    def release(self, prepared: Prepared) -> None:
        """Forget a program; what is still asked for it is refused, for the last few programs."""
        if isinstance(prepared, GrantedPrepared):
            for work in prepared.active.values():
                work.cancel()
            if self._programs.release(prepared.program.key, prepared, keep=False) and self._exchange is not None:
                self._exchange.wake()

    def close(self) -> None:
        """End connections and channels, then the network."""
        atexit.unregister(self.close)
        exchange, self._exchange, self._closed = self._exchange, None, True
        if exchange is not None:
            exchange.close()
            self._network.close()

    def _batches(
        self, program: TransferProgram, buckets: Sequence[Bucket]
    ) -> dict[int, tuple[Bucket, Sequence[Batch]]]:
        return {bucket.index: (bucket, batches_of(bucket, program.regions, self._limits)) for bucket in buckets}

    def _expected(self, peer: str, envelopes: Sequence[Envelope]) -> Sequence[Sequence[Batch]] | None:
        """Called by the exchange's thread: where a turn's buckets go; None while their program is not prepared."""
        prepared = self._programs.made(envelopes[0].program)
        if prepared is None:
            return None
        found = []
        for envelope in envelopes:
            bucket, batches = prepared.receives.get(-1 if envelope.bucket is None else envelope.bucket, (None, ()))
            if bucket is None or bucket.peer != peer:
                raise TransportError(f"bucket {envelope.bucket} is not expected from {peer}")
            found.append(batches)
        return found

    def _unwanted(self, envelopes: Sequence[Envelope]) -> bool:
        """Called by the exchange's thread."""
        return self._programs.released(envelopes[0].program)

    def _require_open(self) -> tuple[Member, Address, Exchange]:
        if self._closed or self._own is None or self._exchange is None:
            raise TransportError(f"transport '{self._name}' is {'closed' if self._closed else 'not open yet'}")
        if not self._exchange.alive:
            raise TransportError(f"transport '{self._name}' has stopped: its thread failed, as stderr says")
        return *self._own, self._exchange
