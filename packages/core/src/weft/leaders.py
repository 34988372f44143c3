"""Leaders: one per group of sources and one per replica. They count what members report and decide; they move no bytes.

The machines are `weft.protocol.sources` and `weft.protocol.replica`; here they get notices, losses and deadlines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from weft.board import Board
from weft.deadline import Deadline, Deadlines
from weft.protocol import replica, sources
from weft.protocol.events import Event, heard, tell
from weft.roles import Relay
from weft.wire import Wire

_ANSWER_SECONDS = 10.0
"""A replica's leader may take so long to say why its replica does not install a version that is withdrawn."""


class OfferRecord(msgspec.Struct, array_like=True):
    """What the sources offer. New fields go to the end, with defaults."""

    version: int


class OutcomeRecord(msgspec.Struct, array_like=True):
    """How a version ended in one replica. New fields go to the end, with defaults."""

    version: int
    replica: str
    committed: bool
    reasons: str = ""


class SourceLeader:
    """Offers a version once every source holds it, sends the sources to work replica by replica, and collects
    outcomes.
    """

    def __init__(
        self, wire: Wire, board: Board, members: Sequence[str], leaders: Mapping[str, str], deadlines: Deadlines,
        version: int, relays: Iterable[Relay] = (),
    ) -> None:  # fmt: skip
        """`leaders` are those of the replicas."""
        self._wire, self._board, self._version = wire, board, version
        self._seconds = {
            "begin": deadlines.begin,
            "rest": deadlines.move + deadlines.vote + deadlines.commit,
            "answer": min(_ANSWER_SECONDS, deadlines.begin / 2),
        }
        to: dict[str, list[Relay]] = {name: [] for name in leaders}
        for relay in relays:
            to[relay.to].append(relay)
        receiving = tuple(
            sources.Receiving(name, leader, tuple(r.name for r in to[name]), frozenset(r.replica for r in to[name]))
            for name, leader in leaders.items()
        )
        self._state = sources.Sources(tuple(members), receiving)
        self._limit = {name: Deadline.after(deadlines.begin) for name in leaders}

    @property
    def done(self) -> bool:
        """Whether every replica has an outcome."""
        return self._state.done

    def step(self) -> None:
        """Handle what has been reported."""
        for kind in ("source-offered", "replica-outcome", "source-failed", "replica-begun"):
            for peer, notice in self._wire.take(self._version, kind):
                self._feed(heard(peer, notice))
        if self._wire.any_lost:
            self._count_losses()
        for known in self._state.replicas:
            limit = self._limit[known.replica]
            if limit.expired():
                self._feed(Event("late", replica=known.replica, text=f"within {limit.seconds:.1f} s"))

    def _count_losses(self) -> None:
        if lost := self._wire.lost(self._state.missing):
            self._feed(Event("lost", lost[0].peer, text="; ".join(map(str, lost))))
        for loss in self._wire.lost(self._state.needed()):
            self._feed(Event("lost", loss.peer, text=str(loss)))

    def give_up(self, text: str) -> None:
        """Withdraw from every replica without an outcome, and wait for nobody."""
        for peer, notice in self._wire.take(self._version, "replica-outcome"):
            self._feed(heard(peer, notice))
        self._feed(Event("give-up", text=f"source {self._wire.me.name}: {text}"))

    def _feed(self, event: Event) -> None:
        self._state, actions = sources.step(self._state, event)
        for action in tell(self._wire, self._version, actions):
            if action.what == "wait":
                self._limit[action.about] = Deadline.after(self._seconds[action.text])
            else:
                self._board.show("offer", self._version, "", OfferRecord(self._version))


class ReplicaLeader:
    """Counts the members of one replica through begun, verified, prepared and committed; any failure aborts all of
    them.
    """

    def __init__(
        self, wire: Wire, board: Board, name: str, members: Sequence[str], source_leader: str, version: int, *,
        shadow: bool,
    ) -> None:  # fmt: skip
        self._wire, self._board, self._version = wire, board, version
        self._state = replica.Replica(name, tuple(members), source_leader, shadow)

    def step(self) -> None:
        """Handle what has been reported."""
        for peer, notice in self._wire.take(self._version, "failed", "withdraw", *replica.REPORTS):
            self._feed(heard(peer, notice))
        if self._wire.any_lost:
            for loss in self._wire.lost(self._state.needed()):
                self._feed(Event("lost", loss.peer, text=str(loss)))
        if self._state.reasons:
            self._feed(Event("conclude"))

    def missing(self, report: str) -> Sequence[str]:
        """Members that have not reported so far."""
        return self._state.missing(report)

    def _feed(self, event: Event) -> None:
        self._state, actions = replica.step(self._state, event)
        for action in tell(self._wire, self._version, actions):
            record = OutcomeRecord(self._version, action.about, self._state.committed, action.text)
            self._board.show("outcome", self._version, f"/{action.about}", record)
