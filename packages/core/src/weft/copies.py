"""What a plan consists of, in columns: parts (boxes and their places on both sides) and copies (parts and members).

A part is kept once however many members move it, so that the plan of thousands of ranks stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from weft.table import Int64s, collapse, row_major_strides, volume


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Boxes that move, with their places in one source layout and one target layout: shapes (n,) and (n, k).

    `lo` and `hi` count in the plan's split of the tensor (`Plan.splits`); strides are elements per step of its factors.
    """

    tensor: Int64s
    """Index into `Plan.tensors`."""
    group: Int64s
    """Group of the target's layout."""
    scratch: Int64s
    """Which of the target's scratch groups, counted from 0; -1 for groups in live memory."""
    source_buffer: Int64s
    """Index into the buffers of the sender's source layout, or of its target layout where it is no source (relays)."""
    source_offset: Int64s
    target_buffer: Int64s
    """Index into the target layout's buffers."""
    target_offset: Int64s
    lo: Int64s
    hi: Int64s
    source_strides: Int64s
    target_strides: Int64s

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def numel(self) -> Int64s:
        """Elements per part."""
        return volume(self.lo, self.hi)

    def select(self, rows: Int64s) -> Parts:
        """The parts at `rows`, in that order."""
        return Parts(*(getattr(self, column.name)[rows] for column in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Loops:
    """Parts as loop nests of the fewest axes: neighbouring axes that are contiguous everywhere are one."""

    logical_start: Int64s
    sizes: Int64s
    source_strides: Int64s
    target_strides: Int64s
    logical_strides: Int64s


def loops_of(parts: Parts, splits: Int64s) -> Loops:
    """The loop nests of `parts`. `splits` are the factors of every tensor, shape (tensors, k)."""
    logical = row_major_strides(splits)[parts.tensor]
    sizes, (source, target, flat) = collapse(parts.hi - parts.lo, [parts.source_strides, parts.target_strides, logical])
    return Loops((parts.lo * logical).sum(axis=1), sizes, source, target, flat)


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Who sends which part to whom, in plan order: by target, group and place in the target's memory. Shapes (n,)."""

    source: Int64s
    """Index into `Plan.members`."""
    target: Int64s
    """Index into `Plan.members`."""
    part: Int64s
    """Index into `Plan.parts`."""
    counted: Int64s
    """1 where the copy stands for its elements in the digest of its replica: each logical element once."""

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """One box moved between two members, in columns of int64; shapes (n,) and, for the axes, (n, k).

    A copy is a loop nest: element `index` of it is at `source_offset + index·source_strides` in the source's buffer, at
    `target_offset + index·target_strides` in the target's, and at `logical_start + index·logical_strides` in the
    flattened tensor.
    """

    source: Int64s
    """Index into `Plan.members`."""
    target: Int64s
    """Index into `Plan.members`."""
    tensor: Int64s
    """Index into `Plan.tensors`."""
    group: Int64s
    """Group of the target's layout."""
    scratch: Int64s
    """See `Parts.scratch`."""
    source_buffer: Int64s
    """See `Parts.source_buffer`."""
    source_offset: Int64s
    target_buffer: Int64s
    """Index into the target layout's buffers."""
    target_offset: Int64s
    logical_start: Int64s
    counted: Int64s
    """See `Routes.counted`."""
    sizes: Int64s
    source_strides: Int64s
    target_strides: Int64s
    logical_strides: Int64s

    def __len__(self) -> int:
        return len(self.source)

    @property
    def numel(self) -> Int64s:
        """Elements per copy."""
        return volume(np.zeros_like(self.sizes), self.sizes)

    def select(self, rows: Int64s) -> Copies:
        """The copies at `rows`, in that order."""
        return Copies(*(getattr(self, column.name)[rows] for column in fields(self)))


def expand(routes: Routes, parts: Parts, loops: Loops, rows: Int64s) -> Copies:
    """The copies of some routes, spelled out."""
    part = routes.part[rows]
    return Copies(
        routes.source[rows], routes.target[rows], parts.tensor[part], parts.group[part], parts.scratch[part],
        parts.source_buffer[part], parts.source_offset[part], parts.target_buffer[part], parts.target_offset[part],
        loops.logical_start[part], routes.counted[rows], loops.sizes[part],
        loops.source_strides[part], loops.target_strides[part], loops.logical_strides[part],
    )  # fmt: skip
