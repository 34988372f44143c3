"""What machines are told and what they ask for."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from weft.wire import Notice, Wire


class Step(StrEnum):
    """The steps of one refit in one replica, in order. Any of them may fail, which aborts the refit there."""

    OFFER = "offer"
    """Every source holds its weights; the replica's leader has been told."""
    BEGIN = "begin"
    """Every member of the replica says that it may be written."""
    MOVE = "move"
    """Bytes travel."""
    VERIFY = "verify"
    """A member has every byte and every digest is right."""
    VOTE = "vote"
    """All members have: the leader lets them prepare; a replica that lands in shadow memory pauses first."""
    PREPARE_COMMIT = "prepare_commit"
    """Each member does what may still fail."""
    COMMIT = "commit"
    """The leader has decided; each member installs the version, which cannot fail."""
    RESUME = "resume"
    """All members have: the replica serves the version."""


class Event(NamedTuple):
    """Something that has happened: a notice that came, or something local."""

    kind: str
    sender: str = ""
    """Who sent the notice, or is lost; empty for local events."""
    replica: str = ""
    text: str = ""
    numbers: tuple[int, ...] = ()


class Tell(NamedTuple):
    """Send a notice to a member, possibly oneself."""

    to: str
    notice: Notice


class Do(NamedTuple):
    """Do something here, such as `abort`; `about` says with which replica, where that matters."""

    what: str
    about: str = ""
    text: str = ""


Action = Tell | Do
Actions = tuple[Action, ...]


def heard(sender: str, notice: Notice) -> Event:
    """A notice as an event."""
    return Event(notice.kind, sender, notice.replica, notice.text, notice.numbers)


def tell(wire: Wire, version: int, actions: Actions) -> list[Do]:
    """Send what is to be sent; returns what is to be done, in order."""
    for action in actions:
        if isinstance(action, Tell):
            wire.tell(action.to, version, action.notice)
    return [action for action in actions if isinstance(action, Do)]
