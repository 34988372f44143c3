"""Who could send: the members that hold each box, and of these the nearest to each target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.member import Member
from weft.table import Int64s, Ragged, distinct, ragged_classes, ragged_ranges, unique_rows

LEVELS = 5
"""Of locality: 0 same process, 1 same device, 2 same host, 3 same fabric domain, 4 further."""
HOST, DOMAIN = 2, 3


def locality(source: Member, target: Member) -> int:
    """How far apart two members are, from 0 (same process) to 4."""
    if source.name == target.name:
        return 0
    if source.host == target.host:
        return 1 if source.device == target.device else 2
    return 3 if source.domain == target.domain else 4


def holder_sets(classes: Int64s, layout: Int64s, holding: Sequence[Int64s]) -> tuple[Int64s, Ragged]:
    """The sets of members that hold boxes: (number of each class's set, members of every set, ascending).

    Row i of the sources is of box class `classes[i]` and of source layout `layout[i]`; `holding[l]` are the members
    (ascending) that have source layout l.
    """
    pairs = np.unique(classes * len(holding) + layout)
    per_class = Ragged.by_key(pairs // len(holding), pairs % len(holding), int(classes.max(initial=-1)) + 1)
    number, sets = ragged_classes(per_class)
    members = [np.unique(np.concatenate([holding[n] for n in sets.row(s).tolist()])) for s in range(len(sets))]
    return number, Ragged.of(members)


@dataclass(frozen=True, slots=True)
class Shares:
    """What the same members could send equally well."""

    share: Int64s
    """Number of the share that each request is of."""
    candidates: Ragged
    """Per share, the nearest holders, ascending."""
    level: Int64s
    """How far from the target of each request they are."""


def nearest(sets: Ragged, set_of: Int64s, target: Int64s, members: Sequence[Member]) -> Shares:
    """Group requests by their nearest holders. Request i is for what set `set_of[i]` holds, at member `target[i]`."""
    codes = places(members)
    owner, holder = sets.rows(), sets.values
    pairs, pair = distinct(set_of * len(members) + target, len(sets) * len(members))
    wanted, at = pairs // len(members), pairs % len(members)
    level = np.full(len(pairs), LEVELS - 1, dtype=np.int64)
    for nearness in range(LEVELS - 2, -1, -1):
        code = codes[nearness]
        width = int(code.max(initial=0)) + 1
        there = np.unique(owner * width + code[holder])
        query = wanted * width + code[at]
        place = np.minimum(np.searchsorted(there, query), max(0, len(there) - 1))
        if len(there):
            level[there[place] == query] = nearness
    place_of_pair = np.stack(codes)[level, at]
    first, share_of_pair = unique_rows(np.stack([wanted, level, place_of_pair], axis=1))
    entry_of, entry = ragged_ranges(sets.starts[wanted[first]], sets.sizes[wanted[first]])
    member = holder[entry]
    near = np.stack(codes)[level[first][entry_of], member] == place_of_pair[first][entry_of]
    number, candidates = ragged_classes(Ragged.by_key(entry_of[near], member[near], len(first)))
    return Shares(number[share_of_pair][pair], candidates, level[pair])


def places(members: Sequence[Member]) -> list[Int64s]:
    """Per level of locality, a number for where each member is: equal numbers are that near to each other."""
    keys: list[list[object]] = [
        [m.name for m in members], [(m.host, m.device) for m in members], [m.host for m in members],
        [m.domain for m in members], [None for _ in members],
    ]  # fmt: skip
    codes = []
    for column in keys:
        numbers: dict[object, int] = {}
        codes.append(np.array([numbers.setdefault(key, len(numbers)) for key in column], dtype=np.int64))
    return codes
