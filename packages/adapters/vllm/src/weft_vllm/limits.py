"""How long a control and a trainer wait for an engine's answer.

Always longer than its workers wait for anybody else (`weft.installation`), so that their error, which names who is
late, comes before one that can only name the call.
"""

from __future__ import annotations

from weft.deadline import Deadlines

_ON_THE_WAY_SECONDS = 10.0
"""For an answer to come back, from a machine that is busy."""


def fetched(deadlines: Deadlines) -> float:
    """Seconds until a worker that watches has fetched what is yet to be offered; where versions are published, their
    holder is joined before, and asked for it.
    """
    d = deadlines
    return d.offer + 3 * d.begin + 3 * d.move + d.vote + _ON_THE_WAY_SECONDS


def begun(deadlines: Deadlines) -> float:
    """Seconds for `start_weight_update`."""
    return fetched(deadlines) + _ON_THE_WAY_SECONDS


def updated(deadlines: Deadlines) -> float:
    """Seconds for `update_weights`."""
    d = deadlines
    return d.begin + 3 * d.move + 2 * d.vote + _ON_THE_WAY_SECONDS


def committed(deadlines: Deadlines) -> float:
    """Seconds for `finish_weight_update`."""
    return 2 * deadlines.commit + _ON_THE_WAY_SECONDS


def connected(deadlines: Deadlines) -> float:
    """Seconds for `init_weight_transfer_engine`."""
    return deadlines.rendezvous + _ON_THE_WAY_SECONDS


def refitted(deadlines: Deadlines) -> float:
    """Seconds for the three calls of an update, one after the other."""
    return begun(deadlines) + updated(deadlines) + committed(deadlines)
