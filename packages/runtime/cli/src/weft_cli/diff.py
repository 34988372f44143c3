"""What tells two plans apart. No output here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from weft.plan import Plan
from weft.table import Int64s, unique_rows


class Changes(msgspec.Struct, frozen=True):
    """Names on one side only, and of those on both what differs, in words."""

    added: list[str]
    removed: list[str]
    changed: list[str]


class PairBytes(msgspec.Struct, frozen=True):
    """A pair of members between which the plans move different numbers of bytes."""

    source: str
    target: str
    before: int
    after: int


class Difference(msgspec.Struct, frozen=True):
    """From one plan to another. A copy is known by its sender, receiver, tensor and box, wherever it lies."""

    equal: bool
    """Whether all that follows is empty or 0. Fingerprints may differ all the same, such as by a layout's address."""
    fingerprints: tuple[str, str]
    members: Changes
    tensors: Changes
    policy: list[str]
    copies_added: int
    copies_removed: int
    bytes_added: int
    """Of the copies that were added."""
    bytes_removed: int
    pairs: list[PairBytes]
    """By source and target."""


def diff(before: Plan, after: Plan) -> Difference:
    """Compare two plans, however they were made."""
    members = _changes(*({m.name: _fields(m) for m in plan.members} for plan in (before, after)))
    tensors = _changes(*({t.name: _fields(t) for t in plan.tensors} for plan in (before, after)))
    policy = _changes({"policy": _fields(before.policy)}, {"policy": _fields(after.policy)}).changed
    names = sorted({m.name for plan in (before, after) for m in plan.members})
    copies, nbytes = _copies(before, after, names)
    pairs = _pairs(before, after, names)
    found = (*members.added, *members.removed, *members.changed, *tensors.added, *tensors.removed, *tensors.changed)
    return Difference(
        equal=not (found or policy or pairs or any(copies)),
        fingerprints=(before.fingerprint, after.fingerprint),
        members=members,
        tensors=tensors,
        policy=policy,
        copies_added=copies[1],
        copies_removed=copies[0],
        bytes_added=nbytes[1],
        bytes_removed=nbytes[0],
        pairs=pairs,
    )


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__ if name != "name"}


def _changes(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> Changes:
    changed = [
        f"{name}: {field} was {old}, is {after[name][field]}"
        for name in sorted(before.keys() & after.keys())
        for field, old in before[name].items()
        if old != after[name][field]
    ]
    return Changes(sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys()), changed)


def _copies(before: Plan, after: Plan, members: list[str]) -> tuple[list[int], list[int]]:
    """Copies, and bytes, that only `before` has and that only `after` has."""
    plans = (before, after)
    tensors = sorted({tensor.name for plan in plans for tensor in plan.tensors})
    width = max(plan.loops.sizes.shape[1] for plan in plans)
    first, box = unique_rows(np.concatenate([_boxes(plan, tensors, width) for plan in plans]))
    moves = [
        _ends(plan, members) * len(first) + boxes[plan.routes.part]
        for plan, boxes in zip(plans, np.split(box, [len(before.parts)]), strict=True)
    ]
    _, place, same = np.unique(np.concatenate(moves), return_index=True, return_inverse=True)
    nbytes = np.concatenate([plan.copy_bytes for plan in plans])[place]
    counts = [np.bincount(part, minlength=len(place)) for part in np.split(same, [len(moves[0])])]
    only = [np.maximum(0, counts[0] - counts[1]), np.maximum(0, counts[1] - counts[0])]
    return [int(n.sum()) for n in only], [int((n * nbytes).sum()) for n in only]


def _boxes(plan: Plan, tensors: list[str], width: int) -> Int64s:
    """A row per part that is equal in two plans for the same box."""
    loops, pad = plan.loops, ((0, 0), (width - plan.loops.sizes.shape[1], 0))
    tensor = _numbers([tensor.name for tensor in plan.tensors], tensors)[plan.parts.tensor]
    sizes = np.pad(loops.sizes, pad, constant_values=1)
    start = loops.logical_start
    return np.concatenate([tensor[:, None], start[:, None], sizes, np.pad(loops.logical_strides, pad)], axis=1)


def _ends(plan: Plan, members: list[str]) -> Int64s:
    """A number per copy for its sender and receiver, equal in all plans."""
    number = _numbers([member.name for member in plan.members], members)
    return number[plan.routes.source] * len(members) + number[plan.routes.target]


def _pairs(before: Plan, after: Plan, names: list[str]) -> list[PairBytes]:
    totals = []
    for plan in (before, after):
        pair, first = np.unique(_ends(plan, names), return_inverse=True)
        nbytes = np.zeros(len(pair), np.int64)
        np.add.at(nbytes, first, plan.copy_bytes)
        totals.append(dict(zip(pair.tolist(), nbytes.tolist(), strict=True)))
    old, new = totals
    return [
        PairBytes(names[pair // len(names)], names[pair % len(names)], old.get(pair, 0), new.get(pair, 0))
        for pair in sorted(old.keys() | new.keys())
        if old.get(pair) != new.get(pair)
    ]


def _numbers(own: list[str], common: list[str]) -> Int64s:
    place = {name: n for n, name in enumerate(common)}
    return np.array([place[name] for name in own], dtype=np.int64)
