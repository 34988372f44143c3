"""A source: holds its weights, sends them to the replicas that it is told of, and learns how each of them ended. A
target that passes a version on to other replicas is a source to these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from weft.protocol.events import Actions, Do, Event, Tell
from weft.wire import Notice


class Stage(StrEnum):
    """How far this source is with one replica."""

    WAITING = "waiting"
    SENDING = "sending"
    SENT = "sent"
    """Nothing of it is read any more, whether all was sent or it failed."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One replica."""

    replica: str
    stage: Stage = Stage.WAITING
    ended: bool = False
    reason: str | None = None
    """Why it did not install the version, once it has ended; None when it did."""


@dataclass(frozen=True, slots=True)
class Source:
    """State of one source in one refit."""

    leader: str
    replicas: tuple[Serving, ...]
    own_replica: str | None = None
    """The replica of this very member, where it copies from these weights by itself: read until that has ended."""
    digest: tuple[int, int] = (0, 0)
    """Of the version, once a replica has installed it."""
    relay: bool = False
    """Whether it passes on what it received: if it gives up, those that have everything from it need not know."""

    @property
    def released(self) -> bool:
        """Whether no replica needs this source's bytes any more."""
        return all(
            known.ended or (known.stage is Stage.SENT and known.replica != self.own_replica) for known in self.replicas
        )

    @property
    def done(self) -> bool:
        """Whether every replica's outcome is known."""
        return all(known.ended for known in self.replicas)


def step(state: Source, event: Event) -> tuple[Source, Actions]:
    """Local events: `held` (the weights will not change), `sent` (to a replica, everything), `error` (the sending to a
    replica failed) and `give-up`. From the leader: `go` and `outcome`.

    `Do("send", replica)` starts sending, `Do("stop", replica)` ends it.
    """
    match event.kind:
        case "held":
            return state, (Tell(state.leader, Notice("source-offered")),)
        case "go":
            return _change(state, event, Stage.WAITING, Stage.SENDING, (Do("send", event.replica),))
        case "sent":
            return _change(state, event, Stage.SENDING, Stage.SENT, ())
        case "error":
            failed = Tell(state.leader, Notice("source-failed", event.replica, event.text))
            return _change(state, event, Stage.SENDING, Stage.SENT, (Do("stop", event.replica), failed))
        case "outcome":
            return _outcome(state, event)
        case "give-up":
            return _give_up(state, event.text)
    return state, ()


def _change(state: Source, event: Event, before: Stage, after: Stage, actions: Actions) -> tuple[Source, Actions]:
    for known in state.replicas:
        if known.replica == event.replica and known.stage is before and not known.ended:
            return _put(state, replace(known, stage=after)), actions
    return state, ()


def _put(state: Source, changed: Serving) -> Source:
    same = (changed if known.replica == changed.replica else known for known in state.replicas)
    return replace(state, replicas=tuple(same))


def _outcome(state: Source, event: Event) -> tuple[Source, Actions]:
    known = next((known for known in state.replicas if known.replica == event.replica), None)
    if known is None or known.ended:
        return state, ()
    committed = event.numbers[:1] == (1,)
    if committed:
        state = replace(state, digest=(event.numbers[1], event.numbers[2]))
    reason = None if committed else event.text
    return _put(state, replace(known, ended=True, reason=reason)), (Do("stop", event.replica),)


def _give_up(state: Source, text: str) -> tuple[Source, Actions]:
    actions: list[Tell | Do] = []
    for known in state.replicas:
        actions.append(Do("stop", known.replica))
        if not known.ended and not (state.relay and known.stage is Stage.SENT):
            actions.append(Tell(state.leader, Notice("source-failed", known.replica, text)))
            state = _put(state, replace(known, ended=True, reason=text))
    return state, tuple(actions)
