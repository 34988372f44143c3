"""Joining: which part of which source piece feeds which part of which target piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weft.box import Box, common_factors, cuts_of, refine
from weft.catalog import Catalog
from weft.layout import Layout
from weft.table import Int64s, intersect, pairs_by_key, subtract, unique_rows, volume


@dataclass(frozen=True, slots=True)
class Rows:
    """Pieces of several layouts in columns, every tensor in one split that suits both sides. Shapes (n,) and (n, k)."""

    layout: Int64s
    """Which of the layouts."""
    piece: Int64s
    """Row in that layout's piece table; one piece may give several rows."""
    tensor: Int64s
    """Index in the catalog."""
    buffer: Int64s
    offset: Int64s
    lo: Int64s
    hi: Int64s
    strides: Int64s

    def boxes(self) -> Int64s:
        """Rows (tensor, lo…, hi…) that are equal for equal boxes."""
        return np.concatenate([self.tensor[:, None], self.lo, self.hi], axis=1)

    @property
    def numel(self) -> Int64s:
        """Elements per row."""
        return volume(self.lo, self.hi)


@dataclass(frozen=True, slots=True)
class Joined:
    """Both sides in one coordinate system."""

    sources: Rows
    targets: Rows
    factors: Int64s
    """The common split of every tensor, padded on the left with ones: shape (tensors, k)."""


def join_sides(sources: Sequence[Layout], targets: Sequence[Layout], catalog: Catalog) -> Joined:
    """Bring every piece of both sides into the coarsest split of its tensor that suits all of them."""
    splits: dict[int, set[tuple[int, ...]]] = {n: set() for n in range(len(catalog.names))}
    tables = []
    for layout in (*sources, *targets):
        table = layout.pieces
        numbers = np.array([catalog.index.get(tensor.name, -1) for tensor in layout.tensors], dtype=np.int64)
        tensors = numbers[table.tensor] if len(table) else np.zeros(0, np.int64)
        tables.append(tensors)
        keys = np.concatenate([tensors[:, None], table.factors], axis=1)
        for row in keys[unique_rows(keys)[0]].tolist():
            if row[0] >= 0:
                splits[row[0]].add(tuple(row[1:]))
    made: dict[tuple[tuple[int, ...], frozenset[tuple[int, ...]]], tuple[int, ...]] = {}
    common: list[tuple[int, ...]] = []
    for n, shape in enumerate(catalog.shapes):
        key = (shape, frozenset(splits[n]))
        if key not in made:
            made[key] = common_factors(shape, {cut for split in splits[n] for cut in cuts_of(split)})
        common.append(made[key])
    width = max((len(factors) for factors in common), default=0)
    factors = np.array([(1,) * (width - len(f)) + f for f in common], dtype=np.int64).reshape(len(common), width)
    cache: dict[tuple[object, ...], list[tuple[Box, int, tuple[int, ...]]]] = {}
    sides = [
        _rows(part, tables[start : start + len(part)], factors, cache)
        for part, start in ((sources, 0), (targets, len(sources)))
    ]
    return Joined(sides[0], sides[1], factors)


def _rows(
    layouts: Sequence[Layout],
    tensors: Sequence[Int64s],
    factors: Int64s,
    cache: dict[tuple[object, ...], list[tuple[Box, int, tuple[int, ...]]]],
) -> Rows:
    width = factors.shape[1]
    parts: list[tuple[Int64s, ...]] = []
    for number, (layout, tensor) in enumerate(zip(layouts, tensors, strict=True)):
        table = layout.pieces
        known = tensor >= 0
        pad = width - table.factors.shape[1]
        if pad >= 0:
            split, lo, hi, strides = (
                np.pad(column, ((0, 0), (pad, 0)), constant_values=value)
                for column, value in ((table.factors, 1), (table.lo, 0), (table.hi, 1), (table.strides, 0))
            )
            fits = known & (split == factors[tensor]).all(axis=1) if len(factors) else known & False
        else:
            fits = np.zeros(len(table), dtype=bool)
            split, lo, hi, strides = table.factors, table.lo, table.hi, table.strides
        kept = np.flatnonzero(fits)
        if len(kept):
            parts.append(
                (
                    np.full(len(kept), number, np.int64), kept, tensor[kept], table.buffer[kept], table.offset[kept],
                    lo[kept], hi[kept], strides[kept],
                )
            )  # fmt: skip
        rest = np.flatnonzero(known & ~fits)
        if len(rest):
            parts.append(_refined(number, rest, tensor, layout, factors, cache))
    if not parts:
        empty, wide = np.zeros(0, np.int64), np.zeros((0, width), np.int64)
        return Rows(empty, empty, empty, empty, empty, wide, wide, wide)
    return Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _refined(
    number: int,
    rows: Int64s,
    tensor: Int64s,
    layout: Layout,
    factors: Int64s,
    cache: dict[tuple[object, ...], list[tuple[Box, int, tuple[int, ...]]]],
) -> tuple[Int64s, ...]:
    """Rows of pieces whose own split is coarser than the common one; equal boxes of different layers are refined
    once.
    """
    table = layout.pieces
    out: list[tuple[int, int, int, int, Box, tuple[int, ...]]] = []
    for n in rows.tolist():
        final = tuple(factors[tensor[n]].tolist())
        key = (*(tuple(column[n].tolist()) for column in (table.factors, table.lo, table.hi, table.strides)), final)
        if key not in cache:
            cache[key] = refine(Box(*key[:3]), 0, key[3], final)
        out += [
            (n, int(tensor[n]), int(table.buffer[n]), int(table.offset[n]) + offset, box, strides)
            for box, offset, strides in cache[key]
        ]
    columns = [np.array([row[c] for row in out], dtype=np.int64) for c in range(4)]
    lo, hi, strides = (
        np.array(values, dtype=np.int64)
        for values in ([r[4].lo for r in out], [r[4].hi for r in out], [r[5] for r in out])
    )
    return (np.full(len(out), number, np.int64), *columns, lo, hi, strides)


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Intersections of distinct source boxes with target rows: each target element in exactly one of them."""

    target: Int64s
    """Row in `Joined.targets`."""
    box: Int64s
    """Class of equal source boxes."""
    lo: Int64s
    hi: Int64s


def overlaps(joined: Joined) -> tuple[Overlaps, Int64s]:
    """Intersect every target row with the distinct source boxes of its tensor.

    Where distinct source boxes overlap, an element comes from the first that has it (trap 8). Returns the overlaps,
    and for every source row the class of its box.
    """
    sources, targets = joined.sources, joined.targets
    first, classes = unique_rows(sources.boxes())
    left, right = pairs_by_key(targets.tensor, sources.tensor[first])
    source = first[right]
    lo, hi, meets = intersect(targets.lo[left], targets.hi[left], sources.lo[source], sources.hi[source])
    left, right, lo, hi = left[meets], right[meets], lo[meets], hi[meets]
    first_of_pair, second_of_pair = pairs_by_key(left, left)
    later = first_of_pair < second_of_pair
    first_of_pair, second_of_pair = first_of_pair[later], second_of_pair[later]
    _, _, twice = intersect(lo[first_of_pair], hi[first_of_pair], lo[second_of_pair], hi[second_of_pair])
    doubled = np.zeros(len(targets.tensor), dtype=bool)
    doubled[left[first_of_pair[twice]]] = True
    if doubled.any():
        left, right, lo, hi = _first_holder(left, right, lo, hi, doubled)
    return Overlaps(left, right, lo, hi), classes


def _first_holder(
    left: Int64s, right: Int64s, lo: Int64s, hi: Int64s, doubled: npt.NDArray[np.bool_]
) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Cut overlapping intersections so that they become disjoint; bigger ones first, so that few pieces result."""
    plain = ~doubled[left]
    out: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = []
    for target in np.flatnonzero(doubled).tolist():
        rows = np.flatnonzero(left == target)
        elements = volume(lo[rows], hi[rows])
        taken: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for row in rows[np.lexsort((right[rows], -elements))].tolist():
            parts = [(tuple(lo[row].tolist()), tuple(hi[row].tolist()))]
            for low, high in taken:
                parts = subtract(parts, low, high)
            taken += parts
            out += [(target, int(right[row]), low, high) for low, high in parts]
    extra = [np.array([row[c] for row in out], dtype=np.int64) for c in (0, 1)]
    lows, highs = (np.array([row[c] for row in out], dtype=np.int64).reshape(len(out), lo.shape[1]) for c in (2, 3))
    merged = [
        np.concatenate([column[plain], more])
        for column, more in ((left, extra[0]), (right, extra[1]), (lo, lows), (hi, highs))
    ]
    order = np.argsort(merged[0], kind="stable")
    return merged[0][order], merged[1][order], merged[2][order], merged[3][order]


def coverage_faults(joined: Joined, found: Overlaps, names: Mapping[int, str], catalog: Catalog) -> list[str]:
    """Prove that the overlaps write every element of every target row exactly once; name the boxes where they do not.

    `names` maps the number of a target layout to a member that has it.
    """
    targets = joined.targets
    written = np.zeros(len(targets.tensor), np.int64)
    np.add.at(written, found.target, volume(found.lo, found.hi))
    faults: list[str] = []
    for row in np.flatnonzero(written < targets.numel).tolist():
        missing = [(tuple(targets.lo[row].tolist()), tuple(targets.hi[row].tolist()))]
        for n in np.flatnonzero(found.target == row).tolist():
            missing = subtract(missing, tuple(found.lo[n].tolist()), tuple(found.hi[n].tolist()))
        split = tuple(joined.factors[targets.tensor[row]].tolist())
        boxes = ", ".join(str(Box(split, low, high)) for low, high in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        member = names[int(targets.layout[row])]
        faults.append(f"{catalog.names[targets.tensor[row]]}: target {member} wants {boxes}{more}, held by no source")
    left, right = pairs_by_key(found.target, found.target)
    later = left < right
    left, right = left[later], right[later]
    _, _, twice = intersect(found.lo[left], found.hi[left], found.lo[right], found.hi[right])
    for n in np.unique(found.target[left[twice]]).tolist():
        member = names[int(targets.layout[n])]
        faults.append(f"{catalog.names[targets.tensor[n]]}: elements of target {member} would be written twice")
    return faults
