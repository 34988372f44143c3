"""Gates: what a member must have taken before it may pass a bucket on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weft.lower import LoweredBucket, MemberProgram
from weft.table import Int64s, pairs_by_key


def gates(program: MemberProgram, mates: frozenset[str]) -> Mapping[int, frozenset[int]]:
    """Per bucket that a target passes on, the buckets that write the memory it is read from, both by index.

    `mates` are the other members of its replica that are no sources. What goes to them waits only for what comes from
    elsewhere, what goes to another replica for all: replicas pass on in one order, so nobody waits in a ring. Memory is
    compared by the outermost bounds of a bucket in each buffer: a bucket may wait for more than it needs, but only for
    what comes in the same group.
    """
    writer, written = _bounds(program.receives, "target")
    reader, read = _bounds(program.sends, "source")
    left, right = pairs_by_key(read[:, 0], written[:, 0])
    meets = (read[left, 1] < written[right, 2]) & (written[right, 1] < read[left, 2])
    needed: dict[int, set[int]] = {}
    for n, m in zip(reader[left[meets]].tolist(), writer[right[meets]].tolist(), strict=True):
        passed, taken = program.sends[n], program.receives[m]
        if passed.peer not in mates or taken.peer not in mates:
            needed.setdefault(passed.index, set()).add(taken.index)
    return {index: frozenset(buckets) for index, buckets in needed.items()}


def _bounds(buckets: Sequence[LoweredBucket], end: str) -> tuple[Int64s, Int64s]:
    """(bucket, (buffer, first element, last element + 1)) for every buffer of these buckets, at one of their ends."""
    owners, rows = [np.zeros(0, np.int64)], [np.zeros((0, 3), np.int64)]
    for number, copies in enumerate(bucket.copies for bucket in buckets):
        buffer, start, strides = (getattr(copies, f"{end}_{what}") for what in ("buffer", "offset", "strides"))
        last = start + ((copies.sizes - 1) * strides).sum(axis=1)
        order = np.argsort(buffer, kind="stable")
        found, first = np.unique(buffer[order], return_index=True)
        low, high = np.minimum.reduceat(start[order], first), np.maximum.reduceat(last[order], first)
        owners.append(np.full(len(found), number, dtype=np.int64))
        rows.append(np.stack([found, low, high + 1], axis=1))
    return np.concatenate(owners), np.concatenate(rows)
