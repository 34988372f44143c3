"""Choosing the sender of every copy, in closed form: nearest holders first, then bytes in equal shares, then few
peers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from weft.member import Member
from weft.table import Int64s, unique_rows


def locality(source: Member, target: Member) -> int:
    """How far apart two members are: 0 same process, 1 same device, 2 same host, 3 same fabric domain, 4 further."""
    if source.name == target.name:
        return 0
    if source.host == target.host:
        return 1 if source.device == target.device else 2
    return 3 if source.domain == target.domain else 4


def choose_senders(
    classes: Int64s, targets: Int64s, nbytes: Int64s, holders: Sequence[tuple[int, ...]], members: Sequence[Member]
) -> Int64s:
    """The member that sends each copy.

    Copy i is of box class `classes[i]` for member `targets[i]` and `nbytes[i]` long; `holders[c]` are the members
    (indices into `members`, ascending) that hold class c. Copies come in plan order. Among the k nearest holders of
    a set, the copies of that set are laid end to end by target and cut into k equal shares of bytes: loads differ by
    at most one copy, and each target meets about (holders + targets) / targets of them. Integers only, so every
    machine decides alike (trap 73).
    """
    sets: dict[tuple[int, ...], int] = {}
    set_of_class = np.array([sets.setdefault(members_of, len(sets)) for members_of in holders], dtype=np.int64)
    pairs = np.stack([set_of_class[classes], targets], axis=1)
    first, pair_of_copy = unique_rows(pairs)
    ordered_sets = list(sets)
    nearest: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, copy in enumerate(first.tolist()):
        candidates = ordered_sets[int(pairs[copy, 0])]
        target = members[int(pairs[copy, 1])]
        distance = [locality(members[m], target) for m in candidates]
        best = min(distance)
        nearest[tuple(m for m, d in zip(candidates, distance, strict=True) if d == best)].append(number)
    share_of_pair = np.empty(len(first), dtype=np.int64)
    for number, pairs_in in enumerate(nearest.values()):
        share_of_pair[pairs_in] = number
    share = share_of_pair[pair_of_copy]
    chosen = np.empty(len(classes), dtype=np.int64)
    order = np.lexsort((np.arange(len(classes)), targets, share))
    starts = np.searchsorted(share[order], np.arange(len(nearest) + 1))
    for number, candidates in enumerate(nearest):
        rows = order[starts[number] : starts[number + 1]]
        size = nbytes[rows]
        total = max(1, int(size.sum()))
        middle = np.cumsum(size) - (size + 1) // 2
        chosen[rows] = np.array(candidates, dtype=np.int64)[
            np.minimum(middle * len(candidates) // total, len(candidates) - 1)
        ]
    return chosen
