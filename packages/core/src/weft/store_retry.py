"""Operations on a store that may be away for a while: tried again until their time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from weft.deadline import Deadline
from weft.errors import StoreError

TRIES = 3
"""An attempt may take this part of an operation's time, so that a connection that has died in silence is replaced."""
ASK_AGAIN_SECONDS = 15.0
"""A watch asks anew this often, which finds connections that have died in silence."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.02, 0.5

T = TypeVar("T")


def insist(
    url: str,
    what: str,
    attempt: Callable[[], T],
    deadline: Deadline,
    broken: tuple[type[Exception], ...],
    refuse: Callable[[], None],
    advice: str,
) -> T:
    """What `attempt` returns, made again while it raises one of `broken`.

    Raises `StoreError`, with `advice`, at the deadline; `refuse` may raise before every attempt.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        refuse()
        try:
            return attempt()
        except broken as error:
            if deadline.remaining() < pause:
                raise StoreError(
                    f"store {url}: {what}: no answer within {deadline.seconds:.1f} s: "
                    f"{str(error) or type(error).__name__}; {advice}"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
