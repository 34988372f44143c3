"""Deadlines: an instant on the monotonic clock by which a wait must end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from weft.errors import DeadlineError

_FIRST_SLEEP_SECONDS = 20e-6
_LONGEST_SLEEP_SECONDS = 2e-3
_Seconds = Annotated[float, msgspec.Meta(gt=0, extra={"unit": "seconds"})]


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant, made by `Deadline.after`; passed down through every call that may wait."""

    seconds: float
    """How long the caller was willing to wait when it made this deadline."""
    at: float
    """The instant, in seconds of `time.monotonic`."""

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The instant `seconds` from now."""
        return cls(seconds, time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())

    def expired(self) -> bool:
        """Whether the instant has passed."""
        return time.monotonic() >= self.at

    def earlier(self, seconds: float) -> Deadline:
        """This deadline, or one in so many seconds if that is earlier."""
        return self if self.remaining() <= seconds else Deadline.after(seconds)

    def wait(
        self, ready: Callable[[], bool], what: str, late: Callable[[], Sequence[str]],
        longest_seconds: float = _LONGEST_SLEEP_SECONDS,
    ) -> None:  # fmt: skip
        """Poll `ready` until it is true, sleeping a little longer each time (20 µs up to `longest_seconds`).

        Raises `DeadlineError` that says `what` was awaited and names `late()`; errors of `ready` pass through.
        """
        sleep_seconds = _FIRST_SLEEP_SECONDS
        while not ready():
            if self.expired():
                raise DeadlineError(what, self.seconds, late())
            time.sleep(sleep_seconds)
            sleep_seconds = min(2 * sleep_seconds, longest_seconds)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each stage of the protocol may take."""

    rendezvous: _Seconds = 300.0
    """From the first member's arrival until every expected member has registered and connected."""
    offer: _Seconds = 600.0
    """A target waiting for the sources to offer a version."""
    begin: _Seconds = 60.0
    """Sources waiting for every member of a replica to have paused and begun."""
    move: _Seconds = 300.0
    """From the first byte to the last group landed."""
    vote: _Seconds = 60.0
    """From a member's own vote to the replica's decision."""
    commit: _Seconds = 60.0
    """From the decision to the report that every member has committed."""
