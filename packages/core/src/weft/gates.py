"""Gates: what a member must have taken before it may pass a bucket on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weft.lower import LoweredBucket, MemberProgram
from weft.table import Int64s, pairs_by_key


def gates(program: MemberProgram, sources: frozenset[str]) -> Mapping[int, frozenset[int]]:
    """Per bucket that a target passes on, the buckets from sources that write the memory it is read from.

    Both by index. Memory is compared by its outermost bounds, so that a bucket may wait for more than it needs, but
    only for what sources send in the same group: that comes whatever is passed on, so nobody waits in a ring.
    """
    received = [bucket for bucket in program.receives if bucket.peer in sources]
    writer, written = _bounds(received, "target")
    reader, read = _bounds(program.sends, "source")
    left, right = pairs_by_key(read[:, 0], written[:, 0])
    meets = (read[left, 1] < written[right, 2]) & (written[right, 1] < read[left, 2])
    needed: dict[int, set[int]] = {}
    for passed, taken in zip(reader[left[meets]].tolist(), writer[right[meets]].tolist(), strict=True):
        needed.setdefault(program.sends[passed].index, set()).add(received[taken].index)
    return {index: frozenset(buckets) for index, buckets in needed.items()}


def _bounds(buckets: Sequence[LoweredBucket], end: str) -> tuple[Int64s, Int64s]:
    """(bucket, (buffer, first element, last element + 1)) of all copies of these buckets, at one of their ends."""
    owner = np.repeat(np.arange(len(buckets), dtype=np.int64), [len(bucket.copies) for bucket in buckets])
    rows = []
    for each in (bucket.copies for bucket in buckets):
        buffer, start, strides = (getattr(each, f"{end}_{what}") for what in ("buffer", "offset", "strides"))
        rows.append(np.stack([buffer, start, start + ((each.sizes - 1) * strides).sum(axis=1) + 1], axis=1))
    return owner, np.concatenate([np.zeros((0, 3), np.int64), *rows])
