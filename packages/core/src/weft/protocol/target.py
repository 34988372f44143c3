"""A member of a replica: takes its bytes, votes, and installs what all have voted for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from weft.protocol.events import Actions, Do, Event, Tell
from weft.wire import Notice


class Stage(StrEnum):
    """How far a member is with one version."""

    OFFERED = "offered"
    BEGUN = "begun"
    """It may be written: the weights that are served, or the shadow beside them."""
    VERIFIED = "verified"
    """Every byte is here and right."""
    VOTED = "voted"
    """Shadow only: all members are there, so the replica may pause."""
    PAUSED = "paused"
    """Shadow only: this member serves nobody, and its weights may change."""
    CLEARED = "cleared"
    """All members are there: it may install what is left to install, and prepare."""
    PREPARED = "prepared"
    """Nothing that may fail is left."""
    DECIDED = "decided"
    """All members are there: the version will be served, unless one of them dies."""
    COMMITTED = "committed"
    """Installed here."""
    INSTALLED = "installed"
    """Installed by all: it may be served."""
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Target:
    """State of one member in one refit."""

    leader: str
    replica: str
    shadow: bool = False
    """Whether bytes land beside the weights that are served."""
    stage: Stage = Stage.OFFERED
    touched: bool = False
    """Whether the weights that are served may be no whole old version any more, here or at another member: a replica
    that gives the version up then must refuse to serve.
    """
    digest: tuple[int, int] = (0, 0)
    """Of the version, once it is decided."""


_HERE = {
    "ready": (Stage.OFFERED, Stage.BEGUN),
    "arrived": (Stage.BEGUN, Stage.VERIFIED),
    "paused": (Stage.VOTED, Stage.PAUSED),
    "prepared": (Stage.CLEARED, Stage.PREPARED),
    "committed": (Stage.DECIDED, Stage.COMMITTED),
}
"""What this member has done by itself: the stage before and the one after, which its leader is told."""
_THERE = {
    "pause": (Stage.VERIFIED, Stage.VOTED),
    "commit": (Stage.PREPARED, Stage.DECIDED),
    "installed": (Stage.COMMITTED, Stage.INSTALLED),
}
"""What its leader says: the stage before and the one after."""

_BESIDE = (Stage.OFFERED, Stage.BEGUN, Stage.VERIFIED, Stage.VOTED, Stage.PAUSED)
"""With a shadow, nothing that is served has changed here so far."""


def step(state: Target, event: Event) -> tuple[Target, Actions]:
    """Local events: those of `_HERE`, and `error` with its text. From the leader: `pause`, `prepare`, `commit`,
    `installed` and `abort`.
    """
    here, there = _HERE.get(event.kind), _there(state, event.kind)
    if here and state.stage is here[0]:
        told = Tell(state.leader, Notice(here[1].value, state.replica, numbers=event.numbers))
        return _reach(state, here[1]), (told,)
    if there and state.stage is there[0]:
        digest = (event.numbers[0], event.numbers[1]) if event.kind == "commit" else state.digest
        return replace(_reach(state, there[1]), digest=digest), ()
    if state.stage in (Stage.INSTALLED, Stage.ABORTED):
        return state, ()
    if event.kind == "abort":
        return replace(state, stage=Stage.ABORTED), _abandoned(state)
    if event.kind == "error":
        failed = Tell(state.leader, Notice("failed", state.replica, event.text))
        return replace(state, stage=Stage.ABORTED), (failed, *_abandoned(state))
    return state, ()


def _there(state: Target, kind: str) -> tuple[Stage, Stage] | None:
    if kind == "prepare":
        return (Stage.PAUSED if state.shadow else Stage.VERIFIED), Stage.CLEARED
    return _THERE.get(kind)


def _reach(state: Target, stage: Stage) -> Target:
    touching = Stage.PAUSED if state.shadow else Stage.BEGUN
    return replace(state, stage=stage, touched=state.touched or stage is touching)


def _abandoned(state: Target) -> Actions:
    """What is installed here is whole and stays, though the replica must not serve it; what landed beside, too."""
    beside = state.shadow and state.stage in _BESIDE
    return () if beside or state.stage is Stage.COMMITTED else (Do("abort"),)
