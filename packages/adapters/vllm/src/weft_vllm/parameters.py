"""What a parameter of an engine is made of, and how that becomes buffers, pieces and fills."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weft.box import Affine, Box, boxes_from_views, row_major
from weft.builder import LayoutBuilder
from weft.layout import Kind
from weft_vllm.mesh import Place

LOADER = "loader:"
"""Prefix of the scratch buffers that hold whole checkpoint tensors for the engine's own loader."""


@dataclass(frozen=True, slots=True)
class Part:
    """A block of a checkpoint tensor, dense in the parameter's memory."""

    tensor: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    ranges: tuple[tuple[int, int], ...]
    """Half-open, per axis."""
    order: tuple[int, ...] | None = None
    """Axes from the slowest in memory to the fastest; None for the tensor's own order."""

    @property
    def views(self) -> tuple[Affine, Affine]:
        """Elements of the flattened tensor, and of memory from the part's first element on."""
        strides = row_major(self.shape)
        offset = sum(low * stride for (low, _), stride in zip(self.ranges, strides, strict=True))
        axes = self.order or range(len(self.shape))
        sizes = tuple(self.ranges[axis][1] - self.ranges[axis][0] for axis in axes)
        return Affine(offset, sizes, tuple(strides[axis] for axis in axes)), Affine(0, sizes, row_major(sizes))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(high - low for low, high in self.ranges)


def cut(tensor: str, shape: tuple[int, ...], axis: int, first: int, count: int) -> Part:
    """`count` indices of one axis from `first` on, and the whole of the others."""
    whole = [(0, size) for size in shape]
    whole[axis] = (first, first + count)
    return Part(tensor, shape, tuple(whole))


def whole(tensor: str, *shape: int) -> Part:
    """A whole tensor."""
    return Part(tensor, shape, tuple((0, size) for size in shape))


@dataclass(frozen=True, slots=True)
class Parameter:
    """A buffer that stacks parts and is filled with 0 behind them."""

    name: str
    """In the engine's model; with `LOADER` before it, a checkpoint tensor that its loader computes with."""
    parts: Sequence[Part]
    numel: int | None = None
    """When there is more than the parts."""
    dtype: str | None = None
    """When it is not the engine's."""


def vector(name: str, width: int, dtype: str | None = None) -> Parameter:
    """A vector that every rank has."""
    return Parameter(name, [whole(name, width)], dtype=dtype)


def column_parallel(name: str, shape: tuple[int, ...], place: Place, dtype: str | None = None) -> Parameter:
    """A tensor cut along its first axis, which is a linear's output."""
    here = shape[0] // place.mesh.tp
    return Parameter(name, [cut(name, shape, 0, place.tp_rank * here, here)], dtype=dtype)


def row_parallel(
    name: str, height: int, columns: int, place: Place, *, bias: bool = False, is_whole: bool = False
) -> Iterator[Parameter]:
    """A linear cut along its input, or whole: a range of columns, and the whole bias."""
    here = columns if is_whole else columns // place.mesh.tp
    first = 0 if is_whole else place.tp_rank * here
    yield Parameter(f"{name}.weight", [cut(f"{name}.weight", (height, columns), 1, first, here)])
    if bias:
        yield vector(f"{name}.bias", height)


def kinds(bias: bool) -> tuple[str, ...]:
    """The parameters of a linear."""
    return ("weight", "bias") if bias else ("weight",)


class Writer:
    """Adds parameters to layouts, and remembers the boxes of equal parts: layers and ranks repeat them."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._boxes: dict[tuple[object, ...], list[tuple[Box, int, tuple[int, ...]]]] = {}

    def put(self, builder: LayoutBuilder, group: str, parameter: Parameter) -> None:
        """Declare the parameter's buffer, tensors, pieces and fill."""
        dtype = parameter.dtype or self._dtype
        filled = sum(part.numel for part in parameter.parts)
        numel = filled if parameter.numel is None else parameter.numel
        kind = Kind.SCRATCH if parameter.name.startswith(LOADER) else Kind.LIVE
        builder.buffer(parameter.name, dtype, numel, group=group, kind=kind)
        offset = 0
        for part in parameter.parts:
            builder.tensor(part.tensor, part.shape, dtype)
            for box, within, strides in self._boxes_of(part):
                builder.piece(part.tensor, box, parameter.name, offset + within, strides)
            offset += part.numel
        if filled < numel:
            builder.fill(parameter.name, filled, (numel - filled,), (1,))

    def _boxes_of(self, part: Part) -> list[tuple[Box, int, tuple[int, ...]]]:
        key = (part.shape, part.ranges, part.order)
        if key not in self._boxes:
            self._boxes[key] = boxes_from_views(part.shape, *part.views)
        return self._boxes[key]
