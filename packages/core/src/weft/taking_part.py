"""One member's sessions in one version, made from its connection to the job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from weft.board import Board
from weft.connection import Connection
from weft.contracts import Target
from weft.deadline import Deadlines
from weft.leaders import ReplicaLeader, SourceLeader
from weft.policy import Policy
from weft.prepare import Step
from weft.relaying import Relaying
from weft.replay import Clock, Receiver, Sender
from weft.session import SourceSession, TargetSession
from weft.wire import Notice


@dataclass(frozen=True, slots=True)
class TakingPart:
    """What the sessions of all versions have in common."""

    connection: Connection
    board: Board
    deadlines: Deadlines
    policy: Policy

    def offering(self, version: int) -> SourceSession:
        """The part of a member that has a source, not begun yet."""
        connection, clock = self.connection, Clock()
        wire, roles, me = connection.wire, connection.roles, connection.me
        leader = None
        if roles.source_leader == me.name:
            leaders = roles.replica_leaders
            relays = connection.relays
            leader = SourceLeader(wire, self.board, roles.sources, leaders, self.deadlines, version, relays)
        senders = {replica: self._sender(names, version, clock) for replica, names in roles.replicas.items()}
        own_replica = me.replica if connection.local else None
        return SourceSession(wire, version, senders, roles.source_leader, leader, clock, own_replica)

    def _sender(self, names: Sequence[str], version: int, clock: Clock) -> Callable[[], Sender]:
        steps = [step for step in self.connection.sends if step.bucket.peer in names]
        return lambda: self._moving(steps, version, clock, lambda _: True)

    def _moving(self, steps: Sequence[Step], version: int, clock: Clock, may_read: Callable[[int], bool]) -> Sender:
        connection, every = self.connection, self.policy.digest_every
        slots = connection.scratch_slots
        return Sender(connection.wire, connection.prepared, steps, slots, version, clock, every, may_read)

    def installing(self, target: Target, version: int) -> TargetSession:
        """The part of a member that has a target, not begun yet. A replica's leader tells the others that it begins."""
        connection, clock = self.connection, Clock()
        wire, roles, me = connection.wire, connection.roles, connection.me
        replica = me.replica or ""
        leader_name, members = roles.replica_leaders[replica], roles.replicas[replica]
        leader = None
        if leader_name == me.name:
            for member in members:
                if member != me.name:
                    wire.tell(member, version, Notice("begin", replica))
            leader = ReplicaLeader(
                wire, self.board, replica, members, roles.source_leader, version, shadow=self.policy.shadow
            )
        assert connection.target is not None, "only members with a target install"
        receiver = Receiver(
            wire, connection.prepared, connection.receives, connection.local, target, *connection.target, version,
            clock, roles.sources, roles.mates(replica), partial=bool(self.policy.only),
            digest_every=self.policy.digest_every, shadow=connection.shadow,
        )  # fmt: skip

        def passing(names: Sequence[str]) -> Sender:
            steps = [step for step in connection.passed_on if step.bucket.peer in names]
            return self._moving(steps, version, clock, lambda bucket: receiver.has(connection.gates[bucket]))

        peers = {step.bucket.peer for step in connection.passed_on}
        others = {name: partial(passing, names) for name, names in roles.replicas.items() if peers & {*names}}
        others.pop(replica, None)
        relay = Relaying(wire, version, passing(members), others, roles.source_leader, self.deadlines)
        return TargetSession(wire, version, target, receiver, relay, replica, leader_name, leader, clock)

    def decline(self, version: int, reasons: Sequence[str]) -> None:
        """What a replica's leader says when its replica does not even begin; others say nothing."""
        connection = self.connection
        wire, roles, replica = connection.wire, connection.roles, connection.me.replica or ""
        if roles.replica_leaders[replica] == connection.me.name:
            for member in roles.replicas[replica]:
                wire.tell(member, version, Notice("abort", replica, "\n".join(reasons)))
            wire.tell(roles.source_leader, version, Notice("replica-outcome", replica, "; ".join(reasons), (0,)))
