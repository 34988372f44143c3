"""From boxes that meet to copies between members: who wants each box, who sends it, and where it sits on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from weft.choose import Cut, choose_senders
from weft.copies import Parts, Routes
from weft.counting import Wanted, wanted_by_members
from weft.holders import holder_sets, nearest
from weft.join import Joined, Overlaps
from weft.member import Member
from weft.policy import Policy
from weft.relays import passed_on_by
from weft.rows import Rows
from weft.table import Int64s, distinct, volume

_FEWEST_STEPS = 8
"""A box is cut along its outermost axis with so many steps per part, so that parts come out about as long as meant."""


@dataclass(frozen=True, slots=True)
class Landing:
    """When the rows of the targets land."""

    group: Int64s
    scratch: Int64s
    """Which of the scratch groups it is; -1 for live memory."""


def assign(
    joined: Joined, found: Overlaps, classes: Int64s, members: Sequence[Member], source_addresses: Sequence[str],
    target_addresses: Sequence[str], landing: Landing, item_bytes: Int64s, policy: Policy,
) -> tuple[Parts, Routes, int]:  # fmt: skip
    """The parts and routes of a plan, and the least bytes of its busiest sender.

    `classes` are the box classes of the rows of `joined.sources`; `item_bytes` are bytes per element and tensor.
    """
    source_layout, target_layout = (
        np.array([numbers.get(address or "", -1) for address in addresses], dtype=np.int64)
        for numbers, addresses in (
            ({a: n for n, a in enumerate(source_addresses)}, [m.source_layout for m in members]),
            ({a: n for n, a in enumerate(target_addresses)}, [m.target_layout for m in members]),
        )
    )
    wanted = wanted_by_members(joined, found, members, target_layout, landing.group)
    boxes = wanted.boxes
    tensor = joined.targets.tensor[boxes.target]
    box_bytes = volume(boxes.lo, boxes.hi) * item_bytes[tensor]
    holding = [np.flatnonzero(source_layout == n) for n in range(len(source_addresses))]
    set_of_class, sets = holder_sets(classes, joined.sources.layout, holding)
    shares = nearest(sets, set_of_class[boxes.box][wanted.box], wanted.target, members)
    size, sources = box_bytes[wanted.box], np.flatnonzero(source_layout >= 0)
    held = None
    if policy.relay == "never":
        choice = choose_senders(shares, wanted.target, size, sources, policy.least_cut_bytes)
        sender, cuts = choice.sender, choice.cuts
    else:
        live = landing.scratch[boxes.target] < 0
        giver = passed_on_by(
            wanted, shares, members, policy.relay, tensor, landing.group[boxes.target], live, box_bytes
        )
        first, later = np.flatnonzero(giver < 0), np.flatnonzero(giver >= 0)
        choice = choose_senders(shares.of(first), wanted.target[first], size[first], sources, policy.least_cut_bytes)
        cuts = tuple(replace(cut, copy=int(first[cut.copy])) for cut in choice.cuts)
        sender, held = np.empty(len(giver), dtype=np.int64), np.full(len(giver), -1, dtype=np.int64)
        sender[first], sender[later] = choice.sender, wanted.target[giver[later]]
        held[later] = boxes.target[wanted.box[giver[later]]]
    boxes, copy, sender, box = _cut(wanted, sender, cuts, box_bytes)

    # Where a copy is read: a row of the sender's target layout where it passes on, or else any row of its source
    # layout that has the box.
    place, width = source_layout[sender], len(source_addresses)
    layouts = width
    if held is not None:
        place = np.where(held[copy] < 0, place, layouts + held[copy])
        width += len(joined.targets.tensor)
    used, part = distinct(box * width + place, len(boxes.target) * width)
    box_of, place_of = used // width, used % width
    class_of, first_row = np.unique(classes * layouts + joined.sources.layout, return_index=True)
    found_at = np.searchsorted(class_of, boxes.box[box_of] * layouts + place_of)
    source_row = first_row[np.minimum(found_at, len(first_row) - 1)]
    held_row = np.where(place_of < layouts, source_row, len(joined.sources.tensor) + place_of - layouts)
    parts = _parts(joined, boxes.select(box_of), held_row, landing)
    return parts, Routes(sender, wanted.target[copy], part, wanted.counted[copy]), choice.bound


def _parts(joined: Joined, boxes: Overlaps, held_row: Int64s, landing: Landing) -> Parts:
    """Where boxes sit in the row they are read from, of the sources and behind them the targets, and in their own."""
    row, lo = boxes.target, boxes.lo
    buffer, offset, strides = _memory(joined.sources.followed_by(joined.targets), held_row, lo)
    to_buffer, to_offset, to_strides = _memory(joined.targets, row, lo)
    return Parts(
        tensor=joined.targets.tensor[row], group=landing.group[row], scratch=landing.scratch[row],
        source_buffer=buffer, source_offset=offset, target_buffer=to_buffer, target_offset=to_offset,
        lo=lo, hi=boxes.hi, source_strides=strides, target_strides=to_strides,
    )  # fmt: skip


def _memory(rows: Rows, row: Int64s, lo: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """(buffer, offset, strides) of the boxes that begin at `lo` and lie in these rows."""
    strides = rows.strides[row]
    return rows.buffer[row], rows.offset[row] + ((lo - rows.lo[row]) * strides).sum(axis=1), strides


def _cut(
    wanted: Wanted, sender: Int64s, cuts: Sequence[Cut], box_bytes: Int64s
) -> tuple[Overlaps, Int64s, Int64s, Int64s]:
    """Divide the copies that several members send; returns boxes and, per copy, the one it is of, sender and box."""
    boxes, box = wanted.boxes, wanted.box
    if not cuts:
        return boxes, np.arange(len(box)), sender, box
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
    counts = np.ones(len(box), dtype=np.int64)
    where = np.array(rows, dtype=np.int64)
    counts[[cut.copy for cut in cuts]] = 0
    np.add.at(counts, where, 1)
    old = np.repeat(np.arange(len(box)), counts)
    parts = np.searchsorted(old, where) + np.arange(len(where)) - np.searchsorted(where, where)
    sender, box = sender[old], box[old]
    boxes, added = boxes.extend(box[parts], ranges), len(boxes.target)
    sender[parts], box[parts] = senders, added + np.arange(len(where))
    return boxes, old, sender, box
