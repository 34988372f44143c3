"""Which part of a whole tensor one rank of a device mesh holds: torch's chunk arithmetic, on ranges instead of data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.errors import LayoutError

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of one axis, ascending and apart, in the order in which local memory holds them."""


@dataclass(frozen=True, slots=True)
class Split:
    """One mesh dimension that shards one axis, seen from one rank."""

    axis: int
    parts: int
    """Size of the mesh dimension."""
    index: int
    """This rank's coordinate in it."""
    before: int = 1
    """Chunks into which the axis is cut first, each to be divided over `parts`: torch's
    `_StridedShard.split_factor`; 1 is a plain `Shard`.
    """


def held_ranges(shape: Sequence[int], splits: Sequence[Split]) -> tuple[Ranges, ...]:
    """What a rank holds of every axis of a tensor of this shape; `splits` are in the order of the mesh's dimensions.

    As `torch.chunk`: chunks are `ceil(length / parts)` long, the last ones shorter or empty. A second split of an axis
    divides what the first one left.

    A strided split stands for one that was applied *after* those to its right (FSDP over tensor parallelism), while
    torch reads placements from left to right. Where lengths do not divide, or tensor parallelism cut packed parts of
    the same axis, the two may disagree about who holds what: then this raises `LayoutError`, since nothing but the
    history of the tensor could tell.
    """
    held: list[Ranges] = [((0, size),) if size else () for size in shape]
    for split in splits:
        held[split.axis] = _divide(held[split.axis], split)
    later = [n for n, split in enumerate(splits) if split.before > 1 and _stands_for_later(splits, n)]
    if later:
        applied: list[Ranges] = [((0, size),) if size else () for size in shape]
        for n, split in enumerate(splits):
            if n not in later:
                applied[split.axis] = _divide(applied[split.axis], split)
        for split in (splits[n] for n in reversed(later)):
            applied[split.axis] = _chunk(applied[split.axis], split.parts, split.index)
        faults = [
            f"axis {axis} of {tuple(shape)} does not divide over its two mesh dimensions: by the order of application "
            f"this rank holds {_text(then)}, by torch's placements {_text(now)}; pad the axis or shard another"
            for axis, (then, now) in enumerate(zip(applied, held, strict=True))
            if then != now
        ]
        if faults:
            raise LayoutError(faults)
    return tuple(held)


def _stands_for_later(splits: Sequence[Split], n: int) -> bool:
    """Whether a strided split's factor is the number of shards that the dimensions to its right make of its axis."""
    right = math.prod(other.parts for other in splits[n + 1 :] if other.axis == splits[n].axis)
    return splits[n].before == right


def _divide(ranges: Ranges, split: Split) -> Ranges:
    parts = [_chunk(_chunk(ranges, split.before, n), split.parts, split.index) for n in range(split.before)]
    return _joined([each for part in parts for each in part])


def _chunk(ranges: Ranges, parts: int, index: int) -> Ranges:
    """Chunk `index` of `parts` of the elements in these ranges."""
    length = sum(stop - start for start, stop in ranges)
    each = -(-length // parts)
    first, last = min(each * index, length), min(each * (index + 1), length)
    taken = []
    at = 0
    for start, stop in ranges:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            taken.append((start + low, start + high))
        at += stop - start
    return tuple(taken)


def _joined(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """The same elements in as few ranges as possible."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _text(ranges: Ranges) -> str:
    return ", ".join(f"{start}:{stop}" for start, stop in ranges) or "nothing"
