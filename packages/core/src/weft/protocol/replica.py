"""The leader of a replica: counts its members through the steps and decides. Any failure aborts all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft.digest import Digest
from weft.protocol.events import Actions, Do, Event, Tell
from weft.wire import Notice

REPORTS = ("begun", "verified", "paused", "prepared", "committed")
"""What members report, in order; `paused` only where they land in shadow memory."""


@dataclass(frozen=True, slots=True)
class Replica:
    """State of the leader of one replica in one refit."""

    name: str
    members: tuple[str, ...]
    source_leader: str
    shadow: bool = False
    """Whether members take bytes beside the weights that are served, and the replica pauses only once all have them."""
    reached: frozenset[tuple[str, str]] = frozenset()
    """(report, member) of every report so far."""
    digest: tuple[int, int] = (0, 0)
    """Sum of what members have verified, both lanes."""
    reasons: tuple[str, ...] = ()
    """Why the replica does not install the version."""
    decided: bool = False
    """Whether members were told to commit: from then on only the loss of a member can end it badly."""
    ended: bool = False
    committed: bool = False
    """Whether every member has committed."""

    def missing(self, report: str) -> tuple[str, ...]:
        """Members that have not reported so far."""
        return tuple(sorted(member for member in self.members if (report, member) not in self.reached))

    def needed(self) -> frozenset[str]:
        """Members to the end, the sources' leader until every byte is here: the loss of one of them is a failure."""
        if self.ended:
            return frozenset()
        needed = set(self.missing("committed"))
        if self.missing("verified"):
            needed.add(self.source_leader)
        return frozenset(needed)


def step(state: Replica, event: Event) -> tuple[Replica, Actions]:
    """Events: the reports of members, `failed` and `lost` of one of them, `withdraw` by the sources, and `conclude`,
    which comes after others that came together, so that all their reasons are told at once.
    """
    match event.kind:
        case "failed":
            return _because(state, f"{event.sender}: {event.text}"), ()
        case "lost" if event.sender in state.needed():
            return _because(state, event.text), ()
        case "withdraw" if not state.decided:  # else some members may have committed
            missing = state.missing("begun")
            return _because(state, f"{event.text}; not begun: {', '.join(missing)}" if missing else event.text), ()
        case "conclude" if state.reasons and not state.ended:
            return _end(state, committed=False)
        case report if report in REPORTS and event.sender in state.members:
            return _count(state, event)
    return state, ()


def _because(state: Replica, reason: str) -> Replica:
    return state if state.ended or reason in state.reasons else replace(state, reasons=(*state.reasons, reason))


def _count(state: Replica, event: Event) -> tuple[Replica, Actions]:
    if (event.kind, event.sender) in state.reached:
        return state, ()
    digest = Digest(state.digest)
    if event.kind == "verified" and len(event.numbers) == 2:
        digest += Digest((event.numbers[0], event.numbers[1]))
    state = replace(state, reached=state.reached | {(event.kind, event.sender)}, digest=digest.lanes)
    if state.missing(event.kind) or state.ended or state.reasons:
        return state, ()
    match event.kind:
        case "begun":
            return state, (Tell(state.source_leader, Notice("replica-begun", state.name)),)
        case "verified" if state.shadow:
            return state, _to_all(state, Notice("pause", state.name))
        case "verified" | "paused":
            return state, _to_all(state, Notice("prepare", state.name))
        case "prepared":
            return replace(state, decided=True), _to_all(state, Notice("commit", state.name, numbers=state.digest))
        case _:
            return _end(state, committed=True)


def _end(state: Replica, *, committed: bool) -> tuple[Replica, Actions]:
    state = replace(state, ended=True, committed=committed)
    text = "; ".join(state.reasons)
    numbers = (1, *state.digest) if committed else (0,)
    last = Notice("installed", state.name) if committed else Notice("abort", state.name, "\n".join(state.reasons))
    outcome = Tell(state.source_leader, Notice("replica-outcome", state.name, text, numbers))
    return state, (outcome, *_to_all(state, last), Do("record", state.name, text))


def _to_all(state: Replica, notice: Notice) -> Actions:
    return tuple(Tell(member, notice) for member in state.members)
