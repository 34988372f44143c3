"""The leader of the sources: offers a version once every source holds it, sends them to work replica by replica, and
collects outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from weft.protocol.events import Action, Actions, Do, Event, Tell
from weft.wire import Notice


class Stage(StrEnum):
    """How far one replica is, as the sources' leader knows."""

    WAITING = "waiting"
    """For the sources, or for the replica to begin."""
    BEGUN = "begun"
    """The sources have been told to send."""
    WITHDRAWN = "withdrawn"
    """Given up: the replica's leader has been asked for the reason."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Receiving:
    """One replica."""

    replica: str
    leader: str
    relays: tuple[str, ...] = ()
    """Members of other replicas that pass on to it."""
    after: frozenset[str] = frozenset()
    """The replicas of these."""
    stage: Stage = Stage.WAITING
    begun: bool = False
    """Whether the sources, and its relays, have been told to send."""
    text: str = ""
    """Why it was withdrawn."""


@dataclass(frozen=True, slots=True)
class Sources:
    """State of the leader of the sources in one refit."""

    members: tuple[str, ...]
    replicas: tuple[Receiving, ...]
    offered: frozenset[str] = frozenset()
    """Sources that hold the version."""

    @property
    def done(self) -> bool:
        """Whether every replica has an outcome."""
        return all(replica.stage is Stage.ENDED for replica in self.replicas)

    @property
    def missing(self) -> tuple[str, ...]:
        """Sources that have not offered."""
        return tuple(sorted(set(self.members) - self.offered))

    def needed(self) -> frozenset[str]:
        """Whose loss is a failure: sources until they have offered, leaders of replicas without an outcome."""
        leaders = {replica.leader for replica in self.replicas if replica.stage is not Stage.ENDED}
        return frozenset(leaders.union(() if self.done else self.missing))


def step(state: Sources, event: Event) -> tuple[Sources, Actions]:
    """One event. Replicas that are to get the version from one that ends before it has begun are withdrawn, too."""
    state, actions = _step(state, event)
    for known in state.replicas:
        if known.stage is Stage.ENDED and not known.begun:
            state, caused = _each(state, partial(_missing_out, known))
            actions = (*actions, *caused)
    return state, actions


def _step(state: Sources, event: Event) -> tuple[Sources, Actions]:
    """Events: `source-offered` and `source-failed` by sources, `replica-begun` and `replica-outcome` by leaders, `lost`
    of one of them, `late` (its text says how long was waited) and `give-up`. Of those that come together, outcomes
    go first: a replica's own reason is better than what its end did to a source.

    `Do("wait", replica, for)` asks for a `late` when a deadline has passed: `begin`, `rest` or `answer`.
    """
    match event.kind:
        case "source-offered" if event.sender in state.missing:
            state = replace(state, offered=state.offered | {event.sender})
            return (state, ()) if state.missing else (state, _offer(state))
        case "replica-outcome":
            return _one(state, event.replica, lambda known: _end(state, known, event.text, event.numbers))
        case "source-failed":
            text = f"{'source' if event.sender in state.members else 'relay'} {event.sender}: {event.text}"
            return _one(state, event.replica, lambda known: _withdraw(known, text))
        case "replica-begun":
            return _one(state, event.replica, lambda known: _begun(state, known))
        case "lost" if event.sender in state.missing:
            return _each(state, lambda known: _withdraw(known, event.text))
        case "lost":
            return _each(state, lambda known: _lost(state, known, event))
        case "late":
            return _one(state, event.replica, lambda known: _late(state, known, event.text))
        case "give-up":
            return _each(state, lambda known: _give_up(state, known, event.text))
    return state, ()


Change = tuple[Receiving, Actions]


def _one(state: Sources, replica: str, change: Callable[[Receiving], Change]) -> tuple[Sources, Actions]:
    return _each(state, lambda known: change(known) if known.replica == replica else (known, ()))


def _each(state: Sources, change: Callable[[Receiving], Change]) -> tuple[Sources, Actions]:
    replicas: list[Receiving] = []
    actions: list[Action] = []
    for known in state.replicas:
        changed, caused = (known, ()) if known.stage is Stage.ENDED else change(known)
        replicas.append(changed)
        actions.extend(caused)
    return replace(state, replicas=tuple(replicas)), tuple(actions)


def _offer(state: Sources) -> Actions:
    actions: list[Action] = [Do("record")]
    for known in state.replicas:
        if known.stage is Stage.WAITING:
            actions += [Do("wait", known.replica, "begin"), Tell(known.leader, Notice("offer", known.replica))]
    return tuple(actions)


def _begun(state: Sources, known: Receiving) -> Change:
    if known.stage is not Stage.WAITING:
        return known, ()
    go = tuple(Tell(source, Notice("go", known.replica)) for source in (*state.members, *known.relays))
    return replace(known, stage=Stage.BEGUN, begun=True), (Do("wait", known.replica, "rest"), *go)


def _withdraw(known: Receiving, text: str) -> Change:
    """Give a replica up, and go by the answer of its leader, who may know why; without one, by what is known here.

    Who fails takes others down with it: what a source sees first may be one of those. Relays of one that has not begun
    need not wait for the answer: it will not begin.
    """
    if known.stage is Stage.WITHDRAWN:
        return known, ()
    told = Tell(known.leader, Notice("withdraw", known.replica, text))
    freed = () if known.begun else tuple(Tell(r, _outcome(known.replica, text)) for r in known.relays)
    return replace(known, stage=Stage.WITHDRAWN, text=text), (Do("wait", known.replica, "answer"), told, *freed)


def _missing_out(ended: Receiving, known: Receiving) -> Change:
    if ended.replica not in known.after:
        return known, ()
    return _withdraw(known, f"replica {ended.replica}, which passes it on, has not begun: {ended.text}")


def _lost(state: Sources, known: Receiving, event: Event) -> Change:
    return _end(state, known, known.text or event.text) if known.leader == event.sender else (known, ())


def _late(state: Sources, known: Receiving, text: str) -> Change:
    if known.stage is Stage.WITHDRAWN:
        return _end(state, known, known.text)
    if state.missing:
        why = f"not offered by {', '.join(state.missing)} {text}"
    else:
        what = "no outcome" if known.stage is Stage.BEGUN else "not begun"
        why = f"replica {known.replica} (leader {known.leader}): {what} {text}"
    return _withdraw(known, why)


def _give_up(state: Sources, known: Receiving, text: str) -> Change:
    known, withdrawn = _withdraw(known, text)
    known, ended = _end(state, known, text)
    return known, (*withdrawn, *ended)


def _end(state: Sources, known: Receiving, text: str, numbers: tuple[int, ...] = (0,)) -> Change:
    outcome = _outcome(known.replica, text, numbers)
    told = tuple(Tell(source, outcome) for source in (*state.members, *known.relays))
    return replace(known, stage=Stage.ENDED, text=text), told


def _outcome(replica: str, text: str, numbers: tuple[int, ...] = (0,)) -> Notice:
    return Notice("outcome", replica, text, numbers)
