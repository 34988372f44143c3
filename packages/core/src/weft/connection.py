"""Joining a job: from a store's URL to a member that has planned, registered, connected and prepared."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from weft.contracts import Prepared, Source, Target, Transport
from weft.deadline import Deadline
from weft.digesters import Digesters, refuse_devices
from weft.errors import ConfigError, RecordError
from weft.facts import Facts, facts_of
from weft.gates import gates
from weft.layout import Layout
from weft.lower import MemberProgram, lower
from weft.member import Member, Region
from weft.plan import fingerprint, plan
from weft.policy import Policy
from weft.prepare import (
    Endpoint,
    LocalMoves,
    Step,
    endpoint_record,
    local_moves,
    make_endpoint,
    make_steps,
    transfer_program,
)
from weft.rendezvous import Rendezvous
from weft.replay import Clock
from weft.roles import Relay, Roles, peers_of, relays_of, roles_of
from weft.shadow import Shadow
from weft.slices import Slice, prove, slice_of
from weft.views import Memory
from weft.wire import Wire


@dataclass(frozen=True, slots=True)
class Identity:
    """What a member says about itself."""

    name: str
    replica: str | None
    replica_size: int
    host: str
    domain: str


@dataclass(frozen=True, slots=True)
class Connection:
    """A member that is ready for its first refit, and everything that was made for it once."""

    me: Member
    roles: Roles
    facts: Mapping[str, Facts]
    """What everybody runs on, by name."""
    slice: Slice
    """Its part of the plan, proven."""
    program: MemberProgram
    endpoint: Endpoint
    wire: Wire
    prepared: Prepared
    sends: tuple[Step, ...]
    """A source's buckets; a mere target's are those that it passes on."""
    gates: Mapping[int, frozenset[int]]
    """Per bucket that it passes on, those it must have taken before."""
    relays: tuple[Relay, ...]
    """All that pass on between replicas; the leader of the sources alone knows them."""
    receives: tuple[Step, ...]
    local: Mapping[int, LocalMoves]
    source: tuple[Layout, Memory] | None
    target: tuple[Layout, Memory] | None
    """What is served."""
    shadow: Shadow | None
    """Where versions land, if not there."""
    scratch_slots: Mapping[str, int]
    """Per target: scratch groups in flight."""
    digested_by: str
    """As in `Report`."""
    segments: int
    """Of all its buckets."""
    registrations: int
    seconds: Mapping[str, float]
    """What joining took: `allocate` (staging), `register`; the rest is meeting, planning, connecting, preparing."""

    @property
    def passed_on(self) -> tuple[Step, ...]:
        """Buckets that a mere target sends."""
        return () if self.source is not None else self.sends


def host_identity() -> str:
    """A name of this machine that differs between machines and containers: host name and boot id."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip()[:8]}" if boot.exists() else socket.gethostname()


def join(
    rendezvous: Rendezvous, transport: Transport, identity: Identity, source: Source | None, target: Target | None,
    policy: Policy, deadline: Deadline, connect_seconds: float = math.inf,
) -> Connection:  # fmt: skip
    """Meet the others, plan, and get ready. Collective: every expected member must call it.

    Once all have said how to be reached, connecting may take `connect_seconds` at most. Raises what the steps raise;
    the other members are told the reason, so that none of them waits for its deadline.
    """
    try:
        sides = [(side.layout(), side.memory()) if side is not None else None for side in (source, target)]
        memories = [tensor for side in sides if side for tensor in side[1].values()]
        if policy.digests:
            refuse_devices({tensor.device for tensor in memories})
        facts = facts_of(memories[0].device if memories else torch.device("cpu"), source, target)
        return _join(rendezvous, transport, identity, facts, sides[0], sides[1], policy, deadline, connect_seconds)
    except Exception as error:
        rendezvous.fail(identity.name, f"{type(error).__name__}: {error}")
        raise


def register(transport: Transport, regions: Sequence[Region], deadline: Deadline) -> None:
    """Register all regions. Raises `ConfigError` that names every region which the transport refuses."""
    refused = []
    for region in regions:
        try:
            transport.register(region, deadline)
        except ConfigError as error:
            refused.append(str(error))
    if refused:
        raise ConfigError("; ".join(refused))


def _join(
    rendezvous: Rendezvous, transport: Transport, identity: Identity, facts: Facts,
    source: tuple[Layout, Memory] | None, target: tuple[Layout, Memory] | None, policy: Policy, deadline: Deadline,
    connect_seconds: float,
) -> Connection:  # fmt: skip
    memories = [tensor for side in (source, target) if side for tensor in side[1].values()]
    own = {side[0].address: side[0] for side in (source, target) if side}
    announced = Member(
        name=identity.name, source_layout=source[0].address if source else None,
        target_layout=target[0].address if target else None, replica=identity.replica if target else None,
        replica_size=identity.replica_size, host=identity.host, domain=identity.domain,
        device=str(memories[0].device) if memories else "cpu", incarnation=rendezvous.incarnation(identity.name),
    )  # fmt: skip
    rendezvous.announce(announced, own, msgspec.msgpack.encode(policy), facts)
    members = rendezvous.members()
    roles = roles_of(members)
    made, relays = _slice(rendezvous, identity.name, roles.source_leader, members, own, policy)
    prove(made, source[0] if source else None, target[0] if target else None)
    program, clock = lower(made), Clock()
    with clock.phase("allocate"):
        shadow = Shadow(*target, policy) if target and policy.shadow else None
        landing = (target[0], shadow.memory) if target and shadow else target
        endpoint = make_endpoint(program, source, landing)

    transport.open(announced)
    with clock.phase("register"):
        register(transport, endpoint.regions, deadline)
    rendezvous.publish_endpoint(
        endpoint_record(identity.name, announced.incarnation, 0, transport.address(), endpoint, made.fingerprint)
    )
    peers = peers_of(identity.name, roles, program, relays)
    endpoints = rendezvous.endpoints(peers)
    by_name = {member.name: member for member in members}
    connecting = deadline.earlier(connect_seconds)
    for peer in sorted(peers):
        transport.connect(by_name[peer], endpoints[peer].address, connecting)
    transfers = transfer_program(made, program, endpoint, endpoints, members)
    prepared = transport.prepare(transfers, deadline)
    held = source or landing
    digesters = Digesters(endpoint.regions) if policy.digests else None
    local = local_moves(made, program, source, landing, digesters) if source and landing else {}
    wire = Wire(transport, announced, members, rendezvous.guard(endpoints))

    def check() -> None:
        wire.pump()
        wire.check(lambda: peers)

    rendezvous.ready(check)
    return Connection(
        me=announced, roles=roles, facts=rendezvous.facts(), slice=made, program=program, endpoint=endpoint,
        wire=wire, prepared=prepared,
        sends=tuple(make_steps(made, program, endpoint, held, True, digesters)) if held else (),
        gates={} if source else gates(program, roles.mates(identity.replica)), relays=relays,
        receives=tuple(make_steps(made, program, endpoint, landing, False, digesters)) if landing else (),
        local=local, source=source, target=target, shadow=shadow,
        scratch_slots={m.name: n for m, n in zip(made.members, made.scratch_slots, strict=True)},
        digested_by=" and ".join(digesters.ways) if digesters else "",
        segments=sum(len(bucket.segments) for bucket in (*transfers.sends, *transfers.receives)),
        registrations=len(endpoint.regions), seconds=clock.seconds,
    )  # fmt: skip


def _slice(
    rendezvous: Rendezvous, name: str, planner: str, members: Sequence[Member], own: Mapping[str, Layout],
    policy: Policy,
) -> tuple[Slice, tuple[Relay, ...]]:  # fmt: skip
    """This member's slice: one member reads all layouts and plans, the others read what it publishes for them. That one
    also finds who passes on between replicas.
    """
    key = fingerprint(members, policy)
    if name != planner:
        made = Slice.decode(rendezvous.slice(key, planner))
        if (made.fingerprint, made.name) != (key, name):
            raise RecordError(
                f"{planner} published a slice of {made.name} of plan {made.fingerprint} for {name}, {key}"
            )
        return made, ()
    addresses = {address for m in members for address in (m.source_layout, m.target_layout) if address}
    layouts = {address: own[address] if address in own else rendezvous.layout(address) for address in sorted(addresses)}
    whole = plan([m for m in members if m.is_source], [m for m in members if m.is_target], layouts, policy)
    others = (member.name for member in whole.members if member.name != name)
    rendezvous.publish_slices(key, ((other, slice_of(whole, other).encoded) for other in others))
    return slice_of(whole, name), relays_of(whole)
