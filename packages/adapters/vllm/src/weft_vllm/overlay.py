"""From the writes of a recording to what finally lies in a parameter: later writes win, and nothing may be left
unwritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weft.box import Affine, Box, boxes_from_views
from weft_vllm.recording import Read, Write


@dataclass(frozen=True, slots=True)
class Placed:
    """One box of a parameter's memory and what lies in it after loading."""

    memory: Affine
    """Elements of the parameter's memory."""
    value: Read | float
    """Elements of a checkpoint tensor over the same index space, or a constant."""


@dataclass(frozen=True, slots=True)
class _Patch:
    box: Box
    """In a split of the flat memory that all writes share."""
    offset: int
    """Element of the checkpoint tensor at the box's first element."""
    strides: tuple[int, ...]
    """Elements of the checkpoint tensor per step of each factor."""
    source: str | float

    def within(self, lo: tuple[int, ...], hi: tuple[int, ...]) -> _Patch:
        shift = sum((new - old) * step for new, old, step in zip(lo, self.box.lo, self.strides, strict=True))
        return _Patch(Box(self.box.factors, lo, hi), self.offset + shift, self.strides, self.source)


def overlay(numel: int, writes: Sequence[Write]) -> tuple[list[Placed], list[Affine]]:
    """What lies where in a parameter of `numel` elements after these writes, by memory offset, and which parts none
    wrote.
    """
    cuts = {stride for write in writes for stride in write.region.strides if stride > 0}
    patches: list[_Patch] = []
    for write in writes:
        sizes = write.region.sizes
        if isinstance(write.value, Read):
            source: str | float = write.value.tensor
            view = write.value.view
        else:
            source, view = write.value, Affine(0, sizes, (0,) * len(sizes))
        for box, offset, strides in boxes_from_views((numel,), write.region, view, cuts):
            patches = [part for patch in patches for part in _without(patch, box)]
            patches.append(_Patch(box, offset, strides, source))
    holes = _holes(numel, cuts, [patch.box for patch in patches])
    placed = [_placed(patch) for patch in patches]
    return sorted(placed, key=lambda p: p.memory.offset), [_memory(box) for box in holes]


def _without(patch: _Patch, hole: Box) -> list[_Patch]:
    """A patch less the part that a later write covers."""
    return [patch.within(lo, hi) for lo, hi in _difference(patch.box, hole)]


def _difference(box: Box, hole: Box) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ranges of `box` outside `hole`; both are in the same split."""
    if any(h <= bl or hl >= bh for bl, bh, hl, h in zip(box.lo, box.hi, hole.lo, hole.hi, strict=True)):
        return [(box.lo, box.hi)]
    parts = []
    lo, hi = list(box.lo), list(box.hi)
    for axis in range(len(lo)):
        for start, stop in ((lo[axis], hole.lo[axis]), (hole.hi[axis], hi[axis])):
            if start < stop:
                parts.append(((*lo[:axis], start, *lo[axis + 1 :]), (*hi[:axis], stop, *hi[axis + 1 :])))
        lo[axis], hi[axis] = max(lo[axis], hole.lo[axis]), min(hi[axis], hole.hi[axis])
    return parts


def _holes(numel: int, cuts: Iterable[int], boxes: Sequence[Box]) -> list[Box]:
    whole = Affine(0, (numel,), (1,))
    left = [box for box, _, _ in boxes_from_views((numel,), whole, whole, cuts)]
    for box in boxes:
        left = [Box(part.factors, lo, hi) for part in left for lo, hi in _difference(part, box)]
    return left


def _memory(box: Box) -> Affine:
    return Affine(box.flat_start, box.sizes, box.flat_strides)


def _placed(patch: _Patch) -> Placed:
    if isinstance(patch.source, str):
        return Placed(_memory(patch.box), Read(patch.source, Affine(patch.offset, patch.box.sizes, patch.strides)))
    return Placed(_memory(patch.box), patch.source)
