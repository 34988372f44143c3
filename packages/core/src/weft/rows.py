"""Pieces of many layouts in columns, every tensor in one split that suits both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat

import numpy as np

from weft.box import Box, common_factors, cuts_of, refine
from weft.layout import Layout
from weft.table import Int64s, Ragged, ragged_classes, ragged_ranges, unique_rows, volume


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

    def select(self, rows: Int64s | slice) -> Rows:
        """Those at `rows`, in that order."""
        return Rows(*(getattr(self, column.name)[rows] for column in fields(self)))


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces as their layouts have them: in splits of their own."""

    rows: Rows
    factors: Int64s
    """The split of every piece, padded on the left with ones: shape (n, k)."""


def pieces_of(layouts: Sequence[Layout], index: Mapping[str, int]) -> Pieces:
    """The pieces of all layouts whose tensors have a number in `index`."""
    width = max((layout.pieces.factors.shape[1] for layout in layouts), default=0)
    total = sum(len(layout.pieces) for layout in layouts)
    flat = [np.empty(total, dtype=np.int64) for _ in range(5)]
    wide = [np.full((total, width), value, dtype=np.int64) for value in (0, 1, 0, 1)]
    at = 0
    for number, layout in enumerate(layouts):
        table = layout.pieces
        end = at + len(table)
        found = map(index.get, [tensor.name for tensor in layout.tensors], repeat(-1))
        names = np.fromiter(found, np.int64, len(layout.tensors))
        flat[0][at:end], flat[1][at:end] = number, np.arange(len(table))
        flat[2][at:end] = names[table.tensor] if len(table) else 0
        flat[3][at:end], flat[4][at:end] = table.buffer, table.offset
        pad = width - table.factors.shape[1]
        for column, values in zip(wide, (table.lo, table.hi, table.strides, table.factors), strict=True):
            column[at:end, pad:] = values
        at = end
    pieces = Pieces(Rows(*flat, *wide[:3]), wide[3])
    known = np.flatnonzero(pieces.rows.tensor >= 0)
    return pieces if len(known) == total else Pieces(pieces.rows.select(known), pieces.factors[known])


def common_splits(pieces: Pieces, shapes_of: Sequence[tuple[int, ...]]) -> Int64s:
    """Per tensor, the coarsest split that suits all its pieces, padded on the left with ones: shape (tensors, k)."""
    tensor, factors = pieces.rows.tensor, pieces.factors
    numbers: dict[tuple[int, ...], int] = {}
    shape_of = np.array([numbers.setdefault(shape, len(numbers)) for shape in shapes_of], dtype=np.int64)
    shapes = list(numbers)
    first, _ = unique_rows(np.concatenate([tensor[:, None], factors], axis=1))
    split_of, split = unique_rows(factors[first])
    cuts = [cuts_of(row) for row in factors[first][split_of].tolist()]
    lists = Ragged.by_key(tensor[first], split, len(shapes_of))
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


def in_splits(pieces: Pieces, splits: Int64s) -> Rows:
    """The same pieces in the splits of their tensors (`splits`, shape (tensors, k)), by layout and piece."""
    table, factors = pieces.rows, pieces.factors
    width = splits.shape[1]
    if width == factors.shape[1] and np.array_equal(splits[table.tensor], factors):
        return table
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
    return rows.select(order)


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
