"""From boxes that meet to copies between members: who wants each box, who sends it, and where it sits on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weft.choose import Cut, choose_senders
from weft.copies import Parts, Routes
from weft.counting import Wanted, wanted_by_members
from weft.holders import holder_sets, nearest
from weft.join import Joined, Overlaps
from weft.member import Member
from weft.table import Int64s, volume

_FEWEST_STEPS = 8
"""A box is cut along its outermost axis with so many steps per part, so that parts come out about as long as meant."""


def assign(
    joined: Joined, found: Overlaps, classes: Int64s, members: Sequence[Member], source_addresses: Sequence[str],
    target_addresses: Sequence[str], group: Int64s, scratch: Int64s, item_bytes: Int64s, least_cut: int,
) -> tuple[Parts, Routes, int]:  # fmt: skip
    """The parts and routes of a plan, and the least bytes of its busiest sender.

    `classes` are the box classes of the rows of `joined.sources`; `group` and `scratch` are the group
    and the scratch group (or -1) of those of `joined.targets`; `item_bytes` are bytes per element and tensor;
    `least_cut` the fewest bytes of a part of a divided copy.
    """
    source_layout, target_layout = (
        np.array([numbers.get(address or "", -1) for address in addresses], dtype=np.int64)
        for numbers, addresses in (
            ({a: n for n, a in enumerate(source_addresses)}, [m.source_layout for m in members]),
            ({a: n for n, a in enumerate(target_addresses)}, [m.target_layout for m in members]),
        )
    )
    wanted = wanted_by_members(joined, found, members, target_layout, group)
    boxes = wanted.boxes
    tensor = joined.targets.tensor[boxes.target]
    box_bytes = volume(boxes.lo, boxes.hi) * item_bytes[tensor]
    holding = [np.flatnonzero(source_layout == n) for n in range(len(source_addresses))]
    set_of_class, sets = holder_sets(classes, joined.sources.layout, holding)
    shares = nearest(sets, set_of_class[boxes.box][wanted.box], wanted.target, members)
    sources = np.flatnonzero(source_layout >= 0)
    choice = choose_senders(shares, wanted.target, box_bytes[wanted.box], sources, least_cut)
    boxes, sender, target, box, counted = _cut(wanted, choice.sender, choice.cuts, box_bytes)

    layouts = len(source_addresses)
    held, first_row = np.unique(classes * layouts + joined.sources.layout, return_index=True)
    used, part = np.unique(box * layouts + source_layout[sender], return_inverse=True)
    box_of, layout_of = used // layouts, used % layouts
    source_row = first_row[np.searchsorted(held, boxes.box[box_of] * layouts + layout_of)]
    parts = _parts(joined, boxes.select(box_of), source_row, group, scratch)
    return parts, Routes(sender, target, part, counted), choice.bound


def _parts(joined: Joined, boxes: Overlaps, source_row: Int64s, group: Int64s, scratch: Int64s) -> Parts:
    """Where boxes sit in one source row and in their target row."""
    sources, targets, row, lo = joined.sources, joined.targets, boxes.target, boxes.lo
    from_strides, to_strides = sources.strides[source_row], targets.strides[row]
    return Parts(
        tensor=targets.tensor[row], group=group[row], scratch=scratch[row], source_buffer=sources.buffer[source_row],
        source_offset=sources.offset[source_row] + ((lo - sources.lo[source_row]) * from_strides).sum(axis=1),
        target_buffer=targets.buffer[row],
        target_offset=targets.offset[row] + ((lo - targets.lo[row]) * to_strides).sum(axis=1),
        lo=lo, hi=boxes.hi, source_strides=from_strides, target_strides=to_strides,
    )  # fmt: skip


def _cut(
    wanted: Wanted, sender: Int64s, cuts: Sequence[Cut], box_bytes: Int64s
) -> tuple[Overlaps, Int64s, Int64s, Int64s, Int64s]:
    """Divide the copies that several members send; returns boxes and, per copy, sender, target, box and whether it is
    counted.
    """
    boxes, target, box, counted = wanted.boxes, wanted.target, wanted.box, wanted.counted
    if not cuts:
        return boxes, sender, target, box, counted
    rows: list[int] = []
    senders: list[int] = []
    ranges: list[tuple[list[int], list[int]]] = []
    for cut in cuts:
        row = int(box[cut.copy])
        lo, hi = boxes.lo[row].tolist(), boxes.hi[row].tolist()
        sizes = [high - low for low, high in zip(lo, hi, strict=True)]
        long = [axis for axis, size in enumerate(sizes) if size >= _FEWEST_STEPS * len(cut.ends)]
        axis = long[0] if long else sizes.index(max(sizes))
        begin = 0
        for end_bytes, member in zip(cut.ends, cut.senders, strict=True):
            end = (2 * sizes[axis] * end_bytes + int(box_bytes[row])) // (2 * int(box_bytes[row]))
            if end > begin:
                low, high = lo.copy(), hi.copy()
                low[axis], high[axis] = lo[axis] + begin, lo[axis] + end
                rows.append(cut.copy)
                senders.append(member)
                ranges.append((low, high))
            begin = max(begin, end)
    where = np.array(rows, dtype=np.int64)
    keep = np.setdiff1d(np.arange(len(box)), where)
    added = len(boxes.target) + np.arange(len(where), dtype=np.int64)
    boxes = boxes.extend(box[where], ranges)
    old = np.concatenate([keep, where])
    order = np.argsort(old, kind="stable")
    old = old[order]
    return (
        boxes, np.concatenate([sender[keep], np.array(senders, dtype=np.int64)])[order], target[old],
        np.concatenate([box[keep], added])[order], counted[old],
    )  # fmt: skip
