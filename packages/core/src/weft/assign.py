"""From boxes that meet to copies between members: who wants each box, who sends it, and where it sits on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.choose import Lots, Runs, choose_senders
from weft.copies import Parts, Routes
from weft.counting import Wanted, wanted_by_members
from weft.holders import holder_sets, nearest
from weft.join import Joined, Overlaps
from weft.member import Member
from weft.policy import Policy
from weft.relays import Wants, passed_on_by
from weft.routes import Sent, spell_out
from weft.rows import Rows
from weft.table import Int64s, Ragged, distinct, ragged_ranges, stable_order, volume


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
    set_of_box, layouts = set_of_class[boxes.box], len(source_addresses)
    givers = None
    if policy.relay != "never" or policy.chain == "always":
        wanted = wanted.apart()
        box, target = wanted.lists.values, wanted.targets[wanted.lists.rows()]
        level = nearest(sets, set_of_box[box], target, members).level
        live = landing.scratch[boxes.target] < 0
        wants = Wants(boxes, box, target, level, tensor, landing.group[boxes.target], live, box_bytes)
        givers = passed_on_by(wants, members, policy.relay, policy.chain == "always")
    sent, bound = _sent(wanted, sets, set_of_box, box_bytes, members, source_layout, givers, policy)
    routes, boxes, place = spell_out(wanted, sent, box_bytes)
    # A place is a source layout, of which any row that has the box will do, or behind them a row of a target.
    class_of, first_row = np.unique(classes * layouts + joined.sources.layout, return_index=True)
    found_at = np.searchsorted(class_of, boxes.box * layouts + place)
    source_row = first_row[np.minimum(found_at, len(first_row) - 1)]
    held_row = np.where(place < layouts, source_row, len(joined.sources.tensor) + place - layouts)
    return _parts(joined, boxes, held_row, landing), routes, bound


def _sent(
    wanted: Wanted, sets: Ragged, set_of_box: Int64s, box_bytes: Int64s, members: Sequence[Member],
    source_layout: Int64s, givers: Int64s | None, policy: Policy,
) -> tuple[Sent, int]:  # fmt: skip
    """Who sends what to whom, and the least bytes of the busiest sender.

    `givers` are, for every copy of `wanted.lists`, the copy whose target passes it on, or -1.
    """
    # In every list, what the same set of members holds is a lot; what is passed on is in a lot of its own.
    box, kinds = wanted.lists.values, len(sets) + 1
    held_by = set_of_box[box] if givers is None else np.where(givers < 0, set_of_box[box], len(sets))
    key = wanted.lists.rows() * kinds + held_by
    order = stable_order(key, len(wanted.lists) * kinds)
    keys, lot = distinct(key, len(wanted.lists) * kinds)
    lots = Lots.of(np.bincount(lot, minlength=len(keys)), box_bytes[box[order]])
    lots_of = Ragged.by_key(keys // kinds, np.arange(len(keys)), len(wanted.lists))
    targets, own = wanted.targets, wanted.list_of[wanted.targets]
    owner, lot = ragged_ranges(lots_of.starts[own], lots_of.sizes[own])
    from_sources = np.flatnonzero(keys[lot] % kinds < len(sets))
    target, lot = targets[owner[from_sources]], lot[from_sources]
    shares = nearest(sets, keys[lot] % kinds, target, members)
    sources = np.flatnonzero(source_layout >= 0)
    choice = choose_senders(shares, target, lot, lots, sources, policy.least_cut_bytes)
    runs, place, width = choice.runs, source_layout[choice.runs.sender], int(source_layout.max()) + 1
    if givers is not None:
        copy = np.flatnonzero(givers[order] >= 0)
        member, giver = targets[wanted.lists.rows()], givers[order[copy]]
        relays = Runs(member[order[copy]], copy, copy + 1, member[giver], np.zeros_like(copy))
        runs, place = Runs.joined([runs, relays]), np.append(place, width + wanted.boxes.target[box[giver]])
        width += int(wanted.boxes.target.max()) + 1
    return Sent(order, runs, place, width), choice.bound


def _parts(joined: Joined, boxes: Overlaps, held_row: Int64s, landing: Landing) -> Parts:
    """Where boxes sit in the row they are read from, of the sources and behind them the targets, and in their own."""
    row, lo = boxes.target, boxes.lo
    buffer, offset, strides = _memory(joined.rows, held_row, lo)
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
