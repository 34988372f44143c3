"""What every target gets, and which of it stands for the version in digests: each logical element once per replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from weft.join import Joined, Overlaps
from weft.member import Member
from weft.table import Int64s, Ragged, first_of_each, meeting, subtract, unique_rows

_Range = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which boxes every member wants: a list that it shares with the members of the same layout, as a rule."""

    boxes: Overlaps
    """Sorted by target layout, group and place in memory; behind these, parts of boxes that had to be divided."""
    lists: Ragged
    """Rows of `boxes`, as they are sorted."""
    list_of: Int64s
    """Number of each member's list; -1 for members that want nothing."""
    counted: tuple[Int64s, ...]
    """Per member, 1 for every box of its list that stands for its elements in the digest of its replica."""

    @property
    def targets(self) -> Int64s:
        """The members that want anything, ascending."""
        return np.flatnonzero(self.list_of >= 0)

    def apart(self) -> Wanted:
        """The same with a list for each member."""
        lists = Ragged.of([self.lists.row(n) for n in self.list_of[self.targets].tolist()])
        return replace(self, lists=lists, list_of=np.where(self.list_of < 0, -1, np.cumsum(self.list_of >= 0) - 1))


def wanted_by_members(
    joined: Joined, found: Overlaps, members: Sequence[Member], layout_of: Int64s, group: Int64s
) -> Wanted:
    """Find which overlaps of layouts the members with these layouts want.

    `layout_of[m]` is the target layout of member m, or -1; `group` the group of every row of `joined.targets`.
    Replicas whose members have the same layouts in the same order count alike, so each such kind is looked at once.
    """
    boxes = _in_order(joined, found, group)
    layout = joined.targets.layout[boxes.target]
    starts = np.searchsorted(layout, np.arange(int(layout_of.max(initial=-1)) + 2))
    lists = np.split(np.arange(len(layout)), starts[1:-1])
    _, same = unique_rows(np.concatenate([joined.targets.tensor[boxes.target][:, None], boxes.lo, boxes.hi], axis=1))
    replicas: dict[str, list[int]] = {}
    for m, member in enumerate(members):
        if layout_of[m] >= 0:
            replicas.setdefault(member.replica or member.name, []).append(m)
    list_of = layout_of.copy()
    counted = [np.zeros(0, np.int64)] * len(members)
    kinds: dict[tuple[int, ...], tuple[Sequence[int], list[Int64s]]] = {}
    for names in replicas.values():
        key = tuple(layout_of[names].tolist())
        if key not in kinds:
            own, flags, divided = _count(joined, boxes, same, [lists[n] for n in key])
            kinds[key] = key, flags
            if divided is not None:
                boxes, kinds[key] = divided, (range(len(lists), len(lists) + len(key)), flags)
                lists += own
        for m, number, flags_of_member in zip(names, *kinds[key], strict=True):
            list_of[m], counted[m] = number, flags_of_member
    return Wanted(boxes, Ragged.of(lists), list_of, tuple(counted))


def _in_order(joined: Joined, found: Overlaps, group: Int64s) -> Overlaps:
    """By target layout, group and place in memory: what is next to each other there moves together."""
    targets, row = joined.targets, found.target
    offset = targets.offset[row] + ((found.lo - targets.lo[row]) * targets.strides[row]).sum(axis=1)
    return found.select(np.lexsort((offset, targets.buffer[row], group[row], targets.layout[row])))


def _count(
    joined: Joined, boxes: Overlaps, same: Int64s, lists: Sequence[Int64s]
) -> tuple[list[Int64s], list[Int64s], Overlaps | None]:
    """Mark boxes of one kind of replica that together hold each logical element once; divide those that overlap in
    part.

    Returns the lists of its members, flags for them, and the boxes if they have become more.
    """
    slot = np.repeat(np.arange(len(lists)), [len(each) for each in lists])
    box, divided = np.concatenate(lists), None
    counted = np.zeros(len(box), dtype=np.int64)
    chosen = first_of_each(same[box], len(same))
    counted[chosen] = 1
    tensor = joined.targets.tensor[boxes.target[box[chosen]]]
    clashing = np.unique(chosen[np.concatenate(meeting(tensor, boxes.lo[box[chosen]], boxes.hi[box[chosen]]))])
    if len(clashing):
        slot, box, counted, divided = _divide(joined, boxes, slot, box, counted, clashing)
    ends = np.searchsorted(slot, np.arange(1, len(lists)))
    return np.split(box, ends), np.split(counted, ends), divided


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
