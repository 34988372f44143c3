"""From runs of copies to parts and routes: every part once, and the routes in plan order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from weft.choose import Runs
from weft.copies import Routes
from weft.counting import Wanted
from weft.join import Overlaps
from weft.table import Int64s, distinct, ragged_ranges, stable_order

_FEWEST_STEPS = 8
"""A box is cut along its outermost axis with so many steps per part, so that parts come out about as long as meant."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Everything that is sent: runs of the copies of `Wanted`, which are in another order here."""

    order: Int64s
    """Number of each copy in the lists of `Wanted`; list by list here, too."""
    runs: Runs
    """Every copy of every target's list is in one of them; ranges of one copy are in their order."""
    place: Int64s
    """Where each run is read, from 0 to `width` - 1."""
    width: int


def spell_out(wanted: Wanted, sent: Sent, box_bytes: Int64s) -> tuple[Routes, Overlaps, Int64s]:
    """The routes, and for every part its box and the place where it is read. `box_bytes` are of all `wanted.boxes`."""
    order, width = sent.order, sent.width
    rank = stable_order(sent.runs.target * len(order) + sent.runs.first, len(wanted.list_of) * len(order))
    runs, place, row = sent.runs.select(rank), sent.place[rank], wanted.lists.values[order]
    boxes, kept, own_box = _cut(wanted.boxes, row, runs, box_bytes)
    runs, place = runs.select(kept), place[kept]

    # Runs that begin alike and are read in the same place move the same parts.
    length = runs.last - runs.first
    whole, cut = np.flatnonzero(own_box < 0), np.flatnonzero(own_box >= 0)
    kinds, kind = distinct(runs.first[whole] * width + place[whole], len(order) * width)
    longest = np.zeros(len(kinds), dtype=np.int64)
    np.maximum.at(longest, kind, length[whole])
    owner, copy = ragged_ranges(kinds // width, longest)
    keys = np.concatenate([row[copy] * width + (kinds % width)[owner], own_box[cut] * width + place[cut]])
    used, part = distinct(keys, len(boxes.target) * width)
    at = np.empty(len(length), dtype=np.int64)
    at[whole], at[cut] = (np.cumsum(longest) - longest)[kind], len(copy) + np.arange(len(cut))
    routes = _routes(wanted, order, runs, at, part)
    return routes, boxes.select(used // width), used % width


def _routes(wanted: Wanted, order: Int64s, runs: Runs, at: Int64s, part: Int64s) -> Routes:
    """Member by member, back in the order of its list. `part[at[n]:]` are the parts of run n."""
    length = runs.last - runs.first
    runs_of = np.searchsorted(runs.target, np.arange(len(wanted.list_of) + 1))
    total = int(length.sum())
    routes = Routes(*(np.empty(total, dtype=np.int64) for _ in range(4)))
    ranks: dict[int, Int64s] = {}
    end = 0
    for member in wanted.targets.tolist():
        own, number = slice(int(runs_of[member]), int(runs_of[member + 1])), int(wanted.list_of[member])
        first, size = int(wanted.lists.starts[number]), int(wanted.lists.sizes[number])
        run, entry = ragged_ranges(at[own], length[own])
        flags = wanted.counted[member]
        if len(entry) == size:
            if number not in ranks:
                ranks[number] = stable_order(order[first : first + size] - first, size)
            rank = ranks[number]
        else:
            _, copy = ragged_ranges(runs.first[own], length[own])
            listed = order[copy] - first
            rank = stable_order(listed, size)
            flags = flags[listed[rank]]
        begin, end = end, end + len(entry)
        routes.source[begin:end] = runs.sender[own][run[rank]]
        routes.target[begin:end] = member
        routes.part[begin:end] = part[entry[rank]]
        routes.counted[begin:end] = flags
    return routes


def _cut(boxes: Overlaps, row: Int64s, runs: Runs, box_bytes: Int64s) -> tuple[Overlaps, Int64s, Int64s]:
    """Divide the boxes of copies that several members send; copy n is of box `row[n]`.

    Returns the boxes with their parts behind them, which runs remain, and for each its part of a box; -1 for others.
    """
    own = np.full(len(runs.first), -1, dtype=np.int64)
    ranges: list[tuple[list[int], list[int]]] = []
    divided: list[int] = []
    empty: list[int] = []
    for (_, copy), group in groupby(
        np.flatnonzero(runs.until).tolist(), key=lambda n: (int(runs.target[n]), int(runs.first[n]))
    ):
        parts = list(group)
        lo, hi = boxes.lo[row[copy]].tolist(), boxes.hi[row[copy]].tolist()
        sizes = [high - low for low, high in zip(lo, hi, strict=True)]
        long = [axis for axis, size in enumerate(sizes) if size >= _FEWEST_STEPS * len(parts)]
        axis = long[0] if long else sizes.index(max(sizes))
        begin, nbytes = 0, int(box_bytes[row[copy]])
        for n in parts:
            end = (2 * sizes[axis] * int(runs.until[n]) + nbytes) // (2 * nbytes)
            if end <= begin:
                empty.append(n)
                continue
            low, high = lo.copy(), hi.copy()
            low[axis], high[axis] = lo[axis] + begin, lo[axis] + end
            own[n] = len(boxes.target) + len(ranges)
            ranges.append((low, high))
            divided.append(int(row[copy]))
            begin = end
    if ranges:
        boxes = boxes.extend(np.array(divided), ranges)
    kept = np.delete(np.arange(len(own)), empty)
    return boxes, kept, own[kept]
