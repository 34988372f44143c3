"""Joining: which part of which source piece feeds which part of which target piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from weft.box import Box, common_factors, cuts_of, refine
from weft.catalog import Catalog
from weft.layout import Layout
from weft.table import (
    Int64s,
    Ragged,
    intersect,
    pairs_by_key,
    ragged_classes,
    ragged_ranges,
    subtract,
    unique_rows,
    volume,
)


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

    def select(self, rows: Int64s) -> Rows:
        """Those at `rows`, in that order."""
        return Rows(*(getattr(self, column.name)[rows] for column in fields(self)))


@dataclass(frozen=True, slots=True)
class Joined:
    """Both sides in one coordinate system."""

    sources: Rows
    targets: Rows
    splits: Int64s
    """The common split of every tensor, padded on the left with ones: shape (tensors, k)."""


def join_sides(sources: Sequence[Layout], targets: Sequence[Layout], catalog: Catalog) -> Joined:
    """Bring every piece of both sides into the coarsest split of its tensor that suits all of them."""
    table, factors = _all_pieces((*sources, *targets), catalog)
    splits = _common_splits(table.tensor, factors, catalog)
    width = splits.shape[1]
    fits = np.zeros(len(table.tensor), dtype=bool)
    if width >= factors.shape[1]:
        pad = width - factors.shape[1]
        fits = (splits[table.tensor, pad:] == factors).all(axis=1) & (splits[table.tensor, :pad] == 1).all(axis=1)
        wide = [
            np.pad(column, ((0, 0), (pad, 0)), constant_values=value)
            for column, value in ((table.lo, 0), (table.hi, 1), (table.strides, 0))
        ]
        kept = np.flatnonzero(fits)
        direct = Rows(*(c[kept] for c in (table.layout, table.piece, table.tensor, table.buffer, table.offset, *wide)))
    else:
        direct = Rows(*(np.zeros(0, np.int64),) * 5, *(np.zeros((0, width), np.int64),) * 3)
    refined = _refined(table, factors, splits, np.flatnonzero(~fits))
    rows = Rows(*(np.concatenate([getattr(part, f.name) for part in (direct, refined)]) for f in fields(Rows)))
    order = np.lexsort((rows.piece, rows.layout))
    rows = rows.select(order)
    border = int(np.searchsorted(rows.layout, len(sources)))
    held, wanted = rows.select(np.arange(border)), rows.select(np.arange(border, len(order)))
    return Joined(held, replace(wanted, layout=wanted.layout - len(sources)), splits)


def _all_pieces(layouts: Sequence[Layout], catalog: Catalog) -> tuple[Rows, Int64s]:
    """The pieces of all layouts whose tensors the catalog has, in their own splits; and these splits, padded."""
    width = max((layout.pieces.factors.shape[1] for layout in layouts), default=0)
    total = sum(len(layout.pieces) for layout in layouts)
    flat = [np.empty(total, dtype=np.int64) for _ in range(5)]
    wide = [np.full((total, width), value, dtype=np.int64) for value in (0, 1, 0, 1)]
    at = 0
    for number, layout in enumerate(layouts):
        table = layout.pieces
        end = at + len(table)
        names = np.array([catalog.index.get(tensor.name, -1) for tensor in layout.tensors], dtype=np.int64)
        flat[0][at:end], flat[1][at:end] = number, np.arange(len(table))
        flat[2][at:end] = names[table.tensor] if len(table) else 0
        flat[3][at:end], flat[4][at:end] = table.buffer, table.offset
        pad = width - table.factors.shape[1]
        for column, values in zip(wide, (table.lo, table.hi, table.strides, table.factors), strict=True):
            column[at:end, pad:] = values
        at = end
    known = np.flatnonzero(flat[2] >= 0)
    return Rows(*(column[known] for column in (*flat, *wide[:3]))), wide[3][known]


def _common_splits(tensor: Int64s, factors: Int64s, catalog: Catalog) -> Int64s:
    """Per tensor, the coarsest split that suits all its pieces, padded on the left with ones: shape (tensors, k)."""
    numbers: dict[tuple[int, ...], int] = {}
    shape_of = np.array([numbers.setdefault(shape, len(numbers)) for shape in catalog.shapes], dtype=np.int64)
    shapes = list(numbers)
    first, _ = unique_rows(np.concatenate([tensor[:, None], factors], axis=1))
    split_of, split = unique_rows(factors[first])
    cuts = [cuts_of(row) for row in factors[first][split_of].tolist()]
    lists = Ragged.by_key(tensor[first], split, len(catalog.shapes))
    kind_of, kinds = ragged_classes(lists)
    pairs, made_of = unique_rows(np.stack([shape_of, kind_of], axis=1))
    made = [
        common_factors(
            shapes[shape_of[n]], {cut for number in kinds.row(int(kind_of[n])).tolist() for cut in cuts[number]}
        )
        for n in pairs.tolist()
    ]
    width = max((len(f) for f in made), default=0)
    table = np.array([(1,) * (width - len(f)) + f for f in made], dtype=np.int64).reshape(len(made), width)
    return table[made_of]


def _refined(table: Rows, factors: Int64s, splits: Int64s, rows: Int64s) -> Rows:
    """Pieces whose own split is coarser than the common one. Equal boxes of different layers are refined once."""
    width = splits.shape[1]
    columns = (factors, table.lo, table.hi, table.strides, splits[table.tensor])
    first, kind = unique_rows(np.concatenate([column[rows] for column in columns], axis=1))
    boxes: list[list[tuple[Box, int, tuple[int, ...]]]] = []
    for n in rows[first].tolist():
        own, low, high, steps, final = (tuple(column[n].tolist()) for column in columns)
        boxes.append(refine(Box(own, low, high), 0, steps, final))
    counts = np.array([len(found) for found in boxes], dtype=np.int64)
    starts = np.cumsum(counts) - counts
    flat = [entry for found in boxes for entry in found]
    owner, entry = ragged_ranges(starts[kind], counts[kind])
    lo, hi, strides = (
        np.array(values, dtype=np.int64).reshape(len(flat), width)[entry]
        for values in ([e[0].lo for e in flat], [e[0].hi for e in flat], [e[2] for e in flat])
    )
    moved = np.array([e[1] for e in flat], dtype=np.int64)[entry]
    n = rows[owner]
    return Rows(
        table.layout[n], table.piece[n], table.tensor[n], table.buffer[n], table.offset[n] + moved, lo, hi, strides
    )


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Intersections of distinct source boxes with target rows: each target element in exactly one of them."""

    target: Int64s
    """Row in `Joined.targets`."""
    box: Int64s
    """Class of equal source boxes."""
    lo: Int64s
    hi: Int64s

    def select(self, rows: Int64s) -> Overlaps:
        """The overlaps at `rows`, in that order."""
        return Overlaps(self.target[rows], self.box[rows], self.lo[rows], self.hi[rows])

    def extend(self, rows: Int64s, ranges: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Overlaps:
        """With more behind them: parts lo:hi of the overlaps at `rows`."""
        lo, hi = (
            np.array([each[end] for each in ranges], dtype=np.int64).reshape(-1, self.lo.shape[1]) for end in (0, 1)
        )
        return Overlaps(
            np.concatenate([self.target, self.target[rows]]), np.concatenate([self.box, self.box[rows]]),
            np.concatenate([self.lo, lo]), np.concatenate([self.hi, hi]),
        )  # fmt: skip


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
        split = tuple(joined.splits[targets.tensor[row]].tolist())
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
