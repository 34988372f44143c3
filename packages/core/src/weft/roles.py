"""Roles: who leads whom, who passes on to another replica, and whom a member must reach for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weft.lower import MemberProgram
from weft.member import Member
from weft.plan import Plan


@dataclass(frozen=True, slots=True)
class Roles:
    """Who leads whom."""

    sources: tuple[str, ...]
    source_leader: str
    replicas: Mapping[str, tuple[str, ...]]
    """Members of every replica, sorted."""
    replica_leaders: Mapping[str, str]

    def mates(self, replica: str | None) -> frozenset[str]:
        """Members of a replica that are no sources: what they send they pass on."""
        return frozenset(self.replicas.get(replica or "", ())) - {*self.sources}


@dataclass(frozen=True, slots=True)
class Relay:
    """A target that passes on to another replica."""

    name: str
    replica: str
    to: str
    """The other replica."""


def roles_of(members: tuple[Member, ...]) -> Roles:
    """Leaders are the first by name, so that everybody names the same."""
    sources = tuple(sorted(m.name for m in members if m.is_source))
    replicas: dict[str, list[str]] = {}
    for member in members:
        if member.is_target:
            replicas.setdefault(member.replica or member.name, []).append(member.name)
    whole = {replica: tuple(sorted(names)) for replica, names in sorted(replicas.items())}
    return Roles(sources, sources[0], whole, {replica: names[0] for replica, names in whole.items()})


def relays_of(whole: Plan) -> tuple[Relay, ...]:
    """Who passes on from one replica to another."""
    members, routes = whole.members, whole.routes
    is_source = np.array([m.is_source for m in members])
    replicas = np.unique([m.replica or m.name for m in members], return_inverse=True)[1]
    abroad = ~is_source[routes.source] & (replicas[routes.source] != replicas[routes.target])
    pairs = np.unique(routes.source[abroad] * whole.count + routes.target[abroad]).tolist()
    ends = ((members[n // whole.count], members[n % whole.count]) for n in pairs)
    return tuple(Relay(*each) for each in sorted({(a.name, a.replica or a.name, b.replica or b.name) for a, b in ends}))


def peers_of(name: str, roles: Roles, program: MemberProgram, relays: Sequence[Relay]) -> set[str]:
    """Whom a member must reach: the other ends of its buckets, its leaders, and, for a leader, those it leads."""
    peers = {bucket.peer for bucket in (*program.sends, *program.receives)}
    mates = next((names for names in roles.replicas.values() if name in names), ())
    abroad = any(bucket.peer not in mates for bucket in program.sends)
    if name in roles.sources or abroad:
        peers.add(roles.source_leader)
    for replica, names in roles.replicas.items():
        leader = roles.replica_leaders[replica]
        if name in names:
            peers.add(leader)
        if name == leader:
            peers.update(names)
            peers.add(roles.source_leader)
        if name == roles.source_leader:
            peers.add(leader)
    if name == roles.source_leader:
        peers.update(roles.sources, (relay.name for relay in relays))
    return peers - {name}
