"""What every target gets, and which of it stands for the version in digests: each logical element once per replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.join import Joined, Overlaps
from weft.member import Member
from weft.table import Int64s, first_of_each, intersect, pairs_by_key, ragged_ranges, subtract, unique_rows

_Range = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One row per box and member that wants it, in plan order: by member, then as the boxes are sorted."""

    boxes: Overlaps
    """Sorted by target layout, group and place in memory; behind these, parts of boxes that had to be divided."""
    target: Int64s
    """Member."""
    box: Int64s
    """Row of `boxes`."""
    counted: Int64s


def wanted_by_members(
    joined: Joined, found: Overlaps, members: Sequence[Member], layout_of: Int64s, group: Int64s
) -> Wanted:
    """Expand the overlaps of layouts to the members that have these layouts.

    `layout_of[m]` is the target layout of member m, or -1; `group` the group of every row of `joined.targets`.
    Replicas whose members have the same layouts in the same order count alike, so each such kind is looked at once.
    """
    boxes = _in_order(joined, found, group)
    layout = joined.targets.layout[boxes.target]
    starts = np.searchsorted(layout, np.arange(int(layout_of.max(initial=-1)) + 2))
    _, same = unique_rows(np.concatenate([joined.targets.tensor[boxes.target][:, None], boxes.lo, boxes.hi], axis=1))
    replicas: dict[str, list[int]] = {}
    for m, member in enumerate(members):
        if layout_of[m] >= 0:
            replicas.setdefault(member.replica or member.name, []).append(m)
    kinds: dict[tuple[int, ...], _Kind] = {}
    rows: list[_Kind | None] = [None] * len(members)
    slot_of = np.zeros(len(members), dtype=np.int64)
    for names in replicas.values():
        key = tuple(layout_of[names].tolist())
        if key not in kinds:
            kinds[key], boxes = _count(joined, boxes, same, starts, key)
        for slot, m in enumerate(names):
            rows[m], slot_of[m] = kinds[key], slot
    parts = []
    for m, kind in enumerate(rows):
        if kind is not None:
            own = slice(int(kind.starts[slot_of[m]]), int(kind.starts[slot_of[m] + 1]))
            parts.append((np.full(own.stop - own.start, m, np.int64), kind.box[own], kind.counted[own]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] or [np.zeros(0, np.int64)] * 3
    return Wanted(boxes, *columns)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the members of one kind of replica get, one member after the other."""

    starts: Int64s
    box: Int64s
    counted: Int64s


def _in_order(joined: Joined, found: Overlaps, group: Int64s) -> Overlaps:
    """By target layout, group and place in memory: what is next to each other there moves together."""
    targets, row = joined.targets, found.target
    offset = targets.offset[row] + ((found.lo - targets.lo[row]) * targets.strides[row]).sum(axis=1)
    keys = offset, targets.buffer[row], group[row], targets.layout[row]
    return found.select(np.lexsort((*found.lo.T[::-1], targets.tensor[row], *keys)))


def _count(
    joined: Joined, boxes: Overlaps, same: Int64s, starts: Int64s, layouts: tuple[int, ...]
) -> tuple[_Kind, Overlaps]:
    """Mark boxes of one kind of replica that together hold each logical element once; divide those that overlap in
    part.
    """
    first = starts[list(layouts)]
    sizes = starts[np.array(layouts) + 1] - first
    slot, box = ragged_ranges(first, sizes)
    counted = np.zeros(len(box), dtype=np.int64)
    counted[first_of_each(same[box], len(same))] = 1
    chosen = np.flatnonzero(counted)
    tensor = joined.targets.tensor[boxes.target[box[chosen]]]
    several = np.bincount(tensor)[tensor] > 1
    chosen, tensor = chosen[several], tensor[several]
    left, right = pairs_by_key(tensor, tensor)
    left, right = chosen[left[left < right]], chosen[right[left < right]]
    _, _, meets = intersect(*(ends[box[rows]] for rows in (left, right) for ends in (boxes.lo, boxes.hi)))
    clashing = np.unique(np.concatenate([left[meets], right[meets]]))
    if len(clashing):
        slot, box, counted, boxes = _divide(joined, boxes, slot, box, counted, clashing)
    ends = np.cumsum(np.bincount(slot, minlength=len(layouts)))
    return _Kind(np.concatenate([[0], ends]).astype(np.int64), box, counted), boxes


def _divide(
    joined: Joined, boxes: Overlaps, slot: Int64s, box: Int64s, counted: Int64s, clashing: Int64s
) -> tuple[Int64s, Int64s, Int64s, Overlaps]:
    """Divide boxes that overlap others in part into what is counted and what is not. Rare, so one by one."""
    taken: dict[int, list[_Range]] = {}
    out: list[tuple[int, _Range, int]] = []
    for n in clashing.tolist():
        row = int(box[n])
        others = taken.setdefault(int(joined.targets.tensor[boxes.target[row]]), [])
        whole: _Range = (tuple(boxes.lo[row].tolist()), tuple(boxes.hi[row].tolist()))
        fresh = [whole]
        for low, high in others:
            fresh = subtract(fresh, low, high)
        stale = [whole]
        for low, high in fresh:
            stale = subtract(stale, low, high)
        others += fresh
        out += [(n, part, 1) for part in fresh] + [(n, part, 0) for part in stale]
    keep = np.setdiff1d(np.arange(len(box)), clashing)
    where = np.array([n for n, _, _ in out], dtype=np.int64)
    added = len(boxes.target) + np.arange(len(out), dtype=np.int64)
    boxes = boxes.extend(box[where], [part for _, part, _ in out])
    slot = np.concatenate([slot[keep], slot[where]])
    old = np.concatenate([keep, where])
    flags = np.concatenate([counted[keep], np.array([flag for _, _, flag in out], dtype=np.int64)])
    box = np.concatenate([box[keep], added])
    order = np.lexsort((np.arange(len(box)), old, slot))
    return slot[order], box[order], flags[order], boxes
