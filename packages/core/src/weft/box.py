"""Boxes: half-open hyper-rectangles in an axis-split view of a logical tensor.

A logical tensor of shape `(1536, 1024)` can be looked at through the *factors* `(8, 3, 64, 1024)`: its first axis is
split row-major into (groups, parts, head). A box gives a half-open range for every factor. Interleaved QKV,
alternating gate and up columns and strided shards are single boxes in a suitable split, and thousands of rows in the
unsplit one.

Everything here is exact integer arithmetic. `Affine` is the same set of elements seen from flat memory: an offset and
(size, stride) pairs; layouts are usually built from affine views, which frameworks already have, and kept as boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from weft.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open hyper-rectangle in the axis-split view `factors` of a logical tensor."""

    factors: tuple[int, ...]
    """Sizes of the split axes, row-major; consecutive factors multiply to the tensor's axes. Empty for a scalar."""
    lo: tuple[int, ...]
    """First index per factor."""
    hi: tuple[int, ...]
    """One past the last index per factor."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extent per factor."""
        return tuple(high - low for low, high in zip(self.lo, self.hi, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def flat_strides(self) -> tuple[int, ...]:
        """Row-major stride of each factor in the flattened tensor, in elements."""
        return row_major(self.factors)

    @property
    def flat_start(self) -> int:
        """Flat row-major index of the first element."""
        return sum(low * stride for low, stride in zip(self.lo, self.flat_strides, strict=True))

    def __str__(self) -> str:
        ranges = ", ".join(f"{low}:{high}" for low, high in zip(self.lo, self.hi, strict=True))
        return f"[{ranges}] of {self.factors}"


@dataclass(frozen=True, slots=True)
class Affine:
    """`offset + Σ index·stride` for indices `0 ≤ index < size`: a strided view of flat memory, in elements."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of a dense array of these sizes, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def cuts_of(factors: Sequence[int]) -> frozenset[int]:
    """The row-major strides at which a split cuts the flattened tensor: products of all suffixes, 1 and numel
    included.
    """
    cuts = {1}
    step = 1
    for size in reversed(factors):
        step *= size
        cuts.add(step)
    return frozenset(cuts)


def refines(factors: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether consecutive factors multiply to the axes of `shape`, in order."""
    if any(size <= 0 for size in factors) or math.prod(factors) != math.prod(shape):
        return False
    return cuts_of(shape) <= cuts_of(factors)


def common_factors(shape: Sequence[int], cuts: Iterable[int]) -> tuple[int, ...]:
    """The coarsest split of `shape` with all these cuts; where two do not divide one another, their common divisor
    is cut instead.

    Without such a conflict every box whose own cuts are among `cuts` is one box (or, where its ranges straddle a new
    cut, a few) of the result. Boxes on the losing side of a conflict fall apart into more.
    """
    if 0 in shape:
        return tuple(shape)  # no elements, so nothing to cut
    fixed = cuts_of(shape)
    chain = sorted(fixed | {cut for cut in cuts if 1 < cut < math.prod(shape)})
    while True:
        conflict = next(((low, high) for low, high in pairwise(chain) if high % low), None)
        if conflict is None:
            return tuple(high // low for low, high in pairwise(chain))[::-1]
        loser = conflict[0] if conflict[1] in fixed else conflict[1]
        chain = sorted({*chain, math.gcd(*conflict)} - {loser})


def split_axes(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Drop axes of size one and join neighbours that are contiguous in *every* one of the parallel stride lists.

    `strides[k]` are the strides of view k over the same index space; returns joined sizes and stride lists.
    """
    out_sizes: list[int] = []
    out: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        if out_sizes and all(o[-1] == s[axis] * size for o, s in zip(out, strides, strict=True)):
            out_sizes[-1] *= size
            for o, s in zip(out, strides, strict=True):
                o[-1] = s[axis]
        else:
            out_sizes.append(size)
            for o, s in zip(out, strides, strict=True):
                o.append(s[axis])
    return out_sizes, out


def boxes_from_views(
    shape: Sequence[int], logical: Affine, memory: Affine, cuts: Iterable[int] = ()
) -> list[tuple[Box, int, tuple[int, ...]]]:
    """Turn "this strided view of the flattened logical tensor sits in that strided view of memory" into boxes.

    `logical` and `memory` run over the same index space (equal sizes); `cuts` are further cuts that the boxes' split
    must have. Returns `(box, offset, strides)` triples: each box with the memory offset of its first element and a
    memory stride per factor. One box as a rule; a view whose ranges straddle a cut is divided into several.

    Raises `LayoutError` when the logical view runs backwards or leaves the tensor.
    """
    if logical.sizes != memory.sizes:
        raise LayoutError([f"logical view has sizes {logical.sizes}, memory view {memory.sizes}"])
    numel = math.prod(shape)
    if math.prod(logical.sizes) == 0:
        return []
    order = sorted(range(len(logical.sizes)), key=lambda axis: -logical.strides[axis])
    sizes, (at, in_memory) = split_axes(
        [logical.sizes[axis] for axis in order],
        [[logical.strides[axis] for axis in order], [memory.strides[axis] for axis in order]],
    )
    last = logical.offset + sum((n - 1) * s for n, s in zip(sizes, at, strict=True))
    if logical.offset < 0 or last >= numel or any(s <= 0 for s in at) or min(sizes, default=1) < 0:
        raise LayoutError([f"view {logical} does not lie inside a tensor of shape {tuple(shape)}, or repeats elements"])
    factors = common_factors(shape, {*cuts, *at})
    result: list[tuple[Box, int, tuple[int, ...]]] = []
    axes = list(zip(sizes, at, in_memory, strict=True))
    _divide(factors, row_major(factors), logical.offset, memory.offset, axes, result)
    return result


def refine(
    box: Box, offset: int, strides: Sequence[int], factors: tuple[int, ...]
) -> list[tuple[Box, int, tuple[int, ...]]]:
    """Re-express one placed box (memory offset, stride per factor) in a finer split of the same tensor."""
    if box.factors == factors:
        return [(box, offset, tuple(strides))]
    axes = [(size, at, step) for size, at, step in zip(box.sizes, box.flat_strides, strides, strict=True) if size > 1]
    result: list[tuple[Box, int, tuple[int, ...]]] = []
    _divide(factors, row_major(factors), box.flat_start, offset, axes, result)
    return result


def _divide(
    factors: tuple[int, ...],
    strides: tuple[int, ...],
    start: int,
    offset: int,
    axes: list[tuple[int, int, int]],
    result: list[tuple[Box, int, tuple[int, ...]]],
) -> None:
    """Emit the boxes of one affine view `start + Σ i·stride`; recurse on parts where an axis crosses a factor's
    boundary.

    `axes` are (count, stride in the flattened tensor, step in memory).
    """
    lo = [start // stride % size for size, stride in zip(factors, strides, strict=True)]
    hi = [low + 1 for low in lo]
    steps = [0] * len(factors)
    for n, (count, stride, step) in enumerate(axes):
        head = _place(count, stride, step, factors, strides, lo, hi, steps)
        if head is None:
            continue
        for first, many in ((0, head), (head, count - head)):
            part = [(many, stride, step)] if many > 1 else []
            divided = axes[:n] + part + axes[n + 1 :]
            _divide(factors, strides, start + first * stride, offset + first * step, divided, result)
        return
    result.append((Box(factors, tuple(lo), tuple(hi)), offset, tuple(steps)))


def _place(
    count: int,
    stride: int,
    step: int,
    factors: tuple[int, ...],
    strides: tuple[int, ...],
    lo: list[int],
    hi: list[int],
    steps: list[int],
) -> int | None:
    """Put one axis of a view onto the factors it covers, innermost first, into `lo`, `hi` and `steps`.

    Returns None when it fits, else how many of its indices to split off so that both parts are simpler.
    """
    if stride not in strides:
        return count // 2
    unit = 1  # how many of the axis's indices one step of the current factor stands for
    for j in range(len(factors) - 1, -1, -1):
        if strides[j] < stride or factors[j] == 1:
            continue
        remaining, room = count // unit, factors[j] - lo[j]
        if hi[j] - lo[j] != 1:  # another axis is here already: they overlap, or interleave
            return count // 2
        if remaining <= room:
            hi[j], steps[j] = lo[j] + remaining, step * unit
            return None
        if lo[j] != 0:
            return room * unit
        if remaining % factors[j]:
            return remaining // factors[j] * factors[j] * unit
        hi[j], steps[j] = factors[j], step * unit
        unit *= factors[j]
    raise AssertionError("bounds were checked by the caller")
