"""What a refit did, for people and for assertions."""

from __future__ import annotations

import msgspec


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One member's account of one refit. Seconds are wall time of this member."""

    version: int
    digest: str
    """Of the whole version: 32 hexadecimal digits, equal on every replica; zeros when digests are off or sampled."""
    digested_by: str
    """What computed this member's digests: in memory of the processor `numba` or, where there is little or it is not
    installed, `numpy`; on GPUs `triton` or, where it is not installed, `torch`; empty when digests are off.
    """
    bytes: int
    """Bytes this member sent (a source) or wrote (a target)."""
    seconds: dict[str, float]
    """`gather`, `digest`, `land`, `install` (taking a shadow over), `commit`: time spent in them; `wire`: what is left
    of `total`, from begin to commit, waiting included. At targets also `pause`: how much of it the weights could not
    be served.
    """
    buckets: int
    segments: int
    """Byte ranges handed to the transport."""
    registrations: int
    """Regions registered with the transport during this refit; 0 when warm."""
    allocations: int
    """Staging buffers allocated during this refit; 0 when warm."""
    store_operations: int
    relayed_bytes: int = 0
    """What a target passed on to others of its replica."""
    outcomes: dict[str, str | None] = {}
    """On sources, per replica: None when it committed, else why it did not."""
    events: tuple[tuple[float, str], ...] = ()
    """(seconds of `time.monotonic`, what happened)."""
