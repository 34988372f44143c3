"""Relays: targets that pass on what they received, so that a box comes once to every host, or fabric domain.

A relay is a copy whose sender is no source: it reads the sender's own target memory. Relays stay within a replica,
and one is passed on once, by a member that has it from sources: a replica that is aborted takes nobody else along.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weft.holders import Shares, places
from weft.join import Overlaps
from weft.member import Member
from weft.table import Int64s, Ragged, ragged_classes, unique_rows

Truths = npt.NDArray[np.bool_]
_LEVEL = {"host": 2, "domain": 3}
"""Within which level of locality (`weft.holders`) each policy passes boxes on."""


def passed_on_by(
    boxes: Overlaps, box: Int64s, target: Int64s, shares: Shares, members: Sequence[Member], within: str,
    tensor: Int64s, group: Int64s, live: Truths, nbytes: Int64s,
) -> Int64s:  # fmt: skip
    """For every copy that is relayed, the copy whose target passes it on; -1 for those that come from sources.

    Copy i, in plan order, brings row `box[i]` of `boxes` to member `target[i]`. `tensor`, `group`, `live` (whether it
    lands in live memory) and `nbytes` are of every row of `boxes`. Copies of one box to one replica on one host (or in
    one domain) where no source is are a ring: one of them comes from sources, and the rest from its target. Rings of
    the same members share the work by bytes. In a ring the box is in the same group of all, so that nobody waits for a
    later group of a member that waits for it.
    """
    count, found = len(members), np.full(len(target), -1, dtype=np.int64)
    replicas: dict[str, int] = {}
    replica = np.array([replicas.setdefault(m.replica or m.name, len(replicas)) for m in members], dtype=np.int64)
    _, place = unique_rows(np.stack([places(members)[_LEVEL[within]], replica], axis=1))
    _, identity = unique_rows(np.concatenate([tensor[:, None], group[:, None], boxes.lo, boxes.hi], axis=1))
    far = np.flatnonzero(shares.level > _LEVEL[within])
    _, ring, size = np.unique(identity[box[far]] * count + place[target[far]], return_inverse=True, return_counts=True)
    far, ring = far[size[ring] > 1], ring[size[ring] > 1]
    _, first = np.unique(ring * count + target[far], return_index=True)  # by ring, then by member
    row, ring_of = far[first], ring[first]
    source = np.array([m.is_source for m in members])
    able = live[box[row]] & ~source[target[row]]
    givers = Ragged.by_key(ring_of[able], row[able], len(size))
    some = np.flatnonzero(givers.sizes)
    if not len(some):
        return found
    givers = Ragged(givers.starts[some], givers.sizes[some], givers.values)
    kind, _ = ragged_classes(Ragged(givers.starts, givers.sizes, target[givers.values]))
    nbytes_of = nbytes[box[givers.values[givers.starts]]]
    chosen = np.full(len(size), -1, dtype=np.int64)
    chosen[some] = givers.values[givers.starts + _turns(kind, nbytes_of, givers.sizes)]
    giver = chosen[ring]
    found[far] = np.where(target[giver] == target[far], -1, giver)
    return found


def _turns(kind: Int64s, size: Int64s, count: Int64s) -> Int64s:
    """Who passes on each box of `size` bytes, from 0 to `count` - 1: those of a kind are laid end to end and divided
    evenly.
    """
    order = np.argsort(kind, kind="stable")
    end = np.cumsum(size[order])
    first = np.searchsorted(kind[order], kind[order])
    begin = (end - size[order])[first]
    last = np.searchsorted(kind[order], kind[order], side="right") - 1
    total = end[last] - begin
    turn = np.zeros(len(kind), dtype=np.int64)
    turn[order] = (2 * (end - begin) - size[order]) * count[order] // (2 * total)
    return turn
