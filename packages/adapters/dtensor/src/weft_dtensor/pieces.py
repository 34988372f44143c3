"""Local tensors as buffers and pieces of a layout."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from weft.box import Affine, Box
from weft.builder import LayoutBuilder
from weft.errors import LayoutError, NotSupportedError
from weft.layout import Layout
from weft.names import NameMap
from weft_dtensor.shards import Ranges

_NUMBERED = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One rank's part of one tensor of a module."""

    name: str
    """The module's name for it; also the buffer's."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: str
    ranges: tuple[Ranges, ...]
    """What this rank holds, per axis."""
    strides: tuple[int, ...]
    """Of local memory, in elements, per axis."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Local shape."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def span(self) -> int:
        """Elements from the first to the last one in local memory, both included; 0 when this rank holds nothing."""
        if 0 in self.sizes:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.sizes, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class FlatRange:
    """One rank's part of one tensor of a module, where it is a range of the tensor's elements in row-major order."""

    name: str
    """As for `LocalTensor`."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: str
    start: int
    """The first element that this rank holds."""
    span: int
    """How many it holds, dense in its memory."""


def group_of(name: str) -> str:
    """The group a tensor moves in: its layer (the name up to its first number), else its module."""
    numbered = _NUMBERED.match(name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name


def layout_of(
    tensors: Sequence[LocalTensor | FlatRange],
    names: NameMap,
    ties: Mapping[str, str],
    skipped: Iterable[tuple[str, str]] = (),
) -> Layout:
    """The layout of these tensors. `ties` are local names that share another local tensor's memory.

    A tensor of which this rank holds no element is left out. Raises `LayoutError` with every name that the map does
    not cover and every fused tensor that does not divide into its parts.
    """
    stacks = [rule.local for rule in names.rules if len(rule.local) > 1]
    if stacks:
        raise NotSupportedError(f"rules that stack several local tensors ({', '.join(stacks[0])}) are not built")
    names.check([*(tensor.name for tensor in tensors), *ties])
    builder = LayoutBuilder()
    faults: list[str] = []
    for tensor in tensors:
        reason = names.skipped(tensor.name)
        if reason is not None:
            builder.skip(tensor.name, reason)
        elif tensor.span:
            try:
                if isinstance(tensor, FlatRange):
                    _describe_range(builder, tensor, names.logical(tensor.name))
                else:
                    _describe(builder, tensor, names.logical(tensor.name))
            except LayoutError as error:
                faults += error.faults
    declared = {tie.alias: tie.name for tie in names.ties}
    for alias, name in ties.items():
        declared.update(_tied(names, alias, name))
    for alias, name in declared.items():
        builder.tie(alias, name)
    for name, reason in skipped:
        builder.skip(name, reason)
    if faults:
        raise LayoutError(faults)
    return builder.build()


def _tied(names: NameMap, alias: str, name: str) -> Iterator[tuple[str, str]]:
    if names.skipped(alias) is None and names.skipped(name) is None:
        for one, other in zip(names.logical(alias), names.logical(name), strict=True):
            if one != other:
                yield one, other


def _describe(builder: LayoutBuilder, tensor: LocalTensor, logical: tuple[str, ...]) -> None:
    builder.buffer(tensor.name, tensor.dtype, tensor.span, group=group_of(tensor.name))
    stacked, parts = _fusion(tensor.name, tensor.shape, len(logical))
    shape = _part_shape(tensor.shape, stacked, parts)
    declared = set()
    for lo, hi, offset in _local_boxes(tensor):
        for part, low, high, inner in _parts(tensor, stacked, parts, lo, hi):
            if part not in declared:
                declared.add(part)
                builder.tensor(logical[part], shape, tensor.dtype)
            builder.piece(logical[part], Box(shape, low, high), tensor.name, offset + inner, tensor.strides[stacked:])


def _describe_range(builder: LayoutBuilder, held: FlatRange, logical: tuple[str, ...]) -> None:
    """Logical tensors of a fused one are ranges themselves; each range is a few boxes."""
    builder.buffer(held.name, held.dtype, held.span, group=group_of(held.name))
    shape = _part_shape(held.shape, *_fusion(held.name, held.shape, len(logical)))
    each, stop = math.prod(shape), held.start + held.span
    for part in range(held.start // each, -(-stop // each)):
        low, high = max(held.start, part * each), min(stop, (part + 1) * each)
        builder.tensor(logical[part], shape, held.dtype)
        there, here = (Affine(first, (high - low,), (1,)) for first in (low - part * each, low - held.start))
        builder.view(logical[part], there, held.name, here)


def _part_shape(shape: tuple[int, ...], stacked: int, parts: int) -> tuple[int, ...]:
    return shape[stacked:] if parts == 1 else (shape[stacked] // parts, *shape[stacked + 1 :])


def _fusion(name: str, shape: tuple[int, ...], count: int) -> tuple[int, int]:
    """How a tensor divides into `count` equal logical ones: leading axes that only number them, and parts of the next.

    `gate_up_proj[E, 2·I, H]` holding 2·E tensors gives (1, 2): they are `[I, H]`, gate and up of each expert in turn.
    An axis that is exactly as long as what is left to number counts as a stack, `down_proj[E, H, I]` of E as `[H, I]`.
    """
    left = count
    for axis, size in enumerate(shape):
        if left == 1:
            return axis, 1
        if size == 0 or (left % size and size % left):
            break
        if left % size:
            return axis, left
        if size == left and axis + 1 == len(shape):
            break
        left //= size
    if left == 1:
        return len(shape), 1
    raise LayoutError([f"{name}: shape {shape} does not divide into the {count} tensors of its rule"])


def _local_boxes(tensor: LocalTensor) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """(first, one past last, memory offset) of every box of the whole tensor that this rank holds."""
    starts = []
    for ranges in tensor.ranges:
        lengths = [stop - start for start, stop in ranges]
        starts.append([sum(lengths[:n]) for n in range(len(lengths))])
    for chosen in product(*(range(len(ranges)) for ranges in tensor.ranges)):
        box = [ranges[n] for ranges, n in zip(tensor.ranges, chosen, strict=True)]
        offset = sum(start[n] * step for start, n, step in zip(starts, chosen, tensor.strides, strict=True))
        yield tuple(start for start, _ in box), tuple(stop for _, stop in box), offset


def _parts(
    tensor: LocalTensor, stacked: int, parts: int, lo: tuple[int, ...], hi: tuple[int, ...]
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...], int]]:
    """(number, first, one past last, offset within the box) of every logical tensor that meets a box of a fused one."""
    for index in product(*(range(low, high) for low, high in zip(lo[:stacked], hi[:stacked], strict=True))):
        number = 0
        for n, size in zip(index, tensor.shape[:stacked], strict=True):
            number = number * size + n
        at = sum((n - low) * step for n, low, step in zip(index, lo, tensor.strides, strict=False))
        if parts == 1:
            yield number, lo[stacked:], hi[stacked:], at
            continue
        unit, step = tensor.shape[stacked] // parts, tensor.strides[stacked]
        for part in range(lo[stacked] // unit, -(-hi[stacked] // unit)):
            low, high = max(lo[stacked], part * unit), min(hi[stacked], (part + 1) * unit)
            first, last = (low - part * unit, *lo[stacked + 1 :]), (high - part * unit, *hi[stacked + 1 :])
            yield number * parts + part, first, last, at + (low - lo[stacked]) * step


def row_major_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of dense memory."""
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
