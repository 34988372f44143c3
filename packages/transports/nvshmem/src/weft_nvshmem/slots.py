"""When a slot may be written and when it may be read: two counters per pair of members, in symmetric memory.

The sender raises `filled` at the receiver with every put, the receiver raises `freed` at the sender when it has
unpacked one. A batch's number counts from the channel's first; both ends count alike.
"""

from __future__ import annotations

from typing import NamedTuple

from weft.networks import DEPTH

COUNTER_BYTES = 8
"""An unsigned 64-bit number."""


class Step(NamedTuple):
    """What one end does with a batch."""

    slot: int
    """Which of the receiver's slots, and of the sender's own staging buffers."""
    wait: int
    """The other end's counter must have reached this first; 0 means nothing to wait for."""
    signal: int
    """What to set the other end's counter to afterwards."""


def put(number: int) -> Step:
    """The sender's: the batch that had the slot before must have been unpacked (trap 67)."""
    return Step(number % DEPTH, max(0, number - DEPTH + 1), number + 1)


def take(number: int) -> Step:
    """The receiver's: the batch must be there (traps 34, 35)."""
    return Step(number % DEPTH, number + 1, number + 1)
