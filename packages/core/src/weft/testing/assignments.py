"""Ranks laid out by assigning arrays to arrays, here arrays of element numbers, as frameworks place their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from weft.box import Affine
from weft.builder import LayoutBuilder
from weft.layout import Int64s, Layout, LogicalTensor
from weft.naive import Bits

_CAPACITY = 1 << 16


@dataclass(frozen=True, slots=True)
class Write:
    """One array assignment: a strided view of a flattened logical tensor into a strided view of a buffer."""

    tensor: str
    logical: Affine
    buffer: str
    memory: Affine


def affine(view: Int64s, base: Int64s) -> Affine:
    """The strided view of flat memory that `view` is of `base`."""
    offset = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // base.itemsize
    return Affine(offset, view.shape, tuple(stride // base.itemsize for stride in view.strides))


def strided(flat: Bits, view: Affine) -> Bits:
    """A strided view of flat memory."""
    strides = [stride * flat.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.sizes, strides)


@dataclass(slots=True)
class _Buffer:
    name: str
    dtype: str
    group: str
    ids: Int64s = field(default_factory=lambda: np.arange(_CAPACITY, dtype=np.int64))
    used: int = 0


class RankBuilder:
    """Lays out one rank: places blocks of memory, and assigns parts of logical tensors to parts of blocks."""

    def __init__(self, random: Random, tensors: Mapping[str, LogicalTensor], *, fills: bool) -> None:
        self._random = random
        self._tensors = tensors
        self._fills = fills
        self._ids = {name: np.arange(t.numel, dtype=np.int64).reshape(t.shape) for name, t in tensors.items()}
        self._buffers: list[_Buffer] = []
        self._padding: list[tuple[_Buffer, Int64s]] = []
        self._writes: list[Write] = []
        self._names: set[str] = set()
        self._tied: list[tuple[str, str]] = []

    def logical(self, name: str) -> Int64s:
        """Element numbers of a whole logical tensor, in its shape."""
        return self._ids[name]

    def tie(self, alias: str, name: str) -> None:
        self._tied.append((alias, name))

    def declare(self, name: str) -> None:
        """Say that the rank knows a tensor, though it may hold none of it."""
        self._names.add(name)

    def block(self, shape: Sequence[int], dtype: str, group: str) -> Int64s:
        """Memory for an array of this shape: dense, transposed, with padded rows, alone or behind others."""
        buffers = [buffer for buffer in self._buffers if (buffer.dtype, buffer.group) == (dtype, group)]
        if buffers and self._random.random() < 0.5:
            buffer = buffers[-1]
        else:
            buffer = _Buffer(f"buffer{len(self._buffers)}", dtype, group)
            self._buffers.append(buffer)
        if self._random.random() < 0.3:
            self.pad(buffer, buffer.used, self._random.randint(1, 5))
        axes = list(range(len(shape)))
        if self._random.random() < 0.3:
            self._random.shuffle(axes)
        padded = [shape[axis] for axis in axes]
        room = self._random.randint(1, 3) if shape and self._random.random() < 0.2 else 0
        if room:
            padded[-1] += room
        numel = math.prod(padded)
        stored = buffer.ids[buffer.used : buffer.used + numel].reshape(padded)
        buffer.used += numel
        if room:
            self._padding.append((buffer, stored[..., -room:]))
            stored = stored[..., :-room]
        return stored.transpose([axes.index(axis) for axis in range(len(shape))])

    def pad(self, buffer: _Buffer, start: int, numel: int) -> None:
        buffer.used = start + numel
        self._padding.append((buffer, buffer.ids[start : start + numel]))

    def pad_view(self, view: Int64s) -> None:
        """Declare part of a block as padding."""
        if view.size:
            self._padding.append((self._owner(view), view))

    def write(self, name: str, logical: Int64s, memory: Int64s) -> None:
        """Assign a view of a logical tensor's element numbers to a view of a block."""
        if logical.shape != memory.shape:
            raise ValueError(f"{name}: {logical.shape} does not go into {memory.shape}")
        self.declare(name)
        if logical.size:
            buffer = self._owner(memory)
            source = affine(logical, self._ids[name])
            self._writes.append(Write(name, source, buffer.name, affine(memory, buffer.ids)))

    def whole(self, name: str, logical: Int64s, group: str) -> None:
        """A block of its own for a view of a logical tensor."""
        self.write(name, logical, self.block(logical.shape, self._tensors[name].dtype, group))

    def build(self) -> tuple[Layout, tuple[Write, ...]]:
        builder = LayoutBuilder()
        for name in sorted(self._names):
            tensor = self._tensors[name]
            builder.tensor(name, tensor.shape, tensor.dtype)
        for buffer in self._buffers:
            if self._random.random() < 0.2:
                self.pad(buffer, buffer.used, self._random.randint(1, 5))
            builder.buffer(buffer.name, buffer.dtype, buffer.used, group=buffer.group)
        for write in self._writes:
            builder.view(write.tensor, write.logical, write.buffer, write.memory)
        for buffer, view in self._padding:
            if self._fills and view.size:
                at = affine(view, buffer.ids)
                builder.fill(buffer.name, at.offset, at.sizes, at.strides, self._random.choice((0.0, 1.0, 2.0)))
        for alias, name in self._tied:
            builder.tie(alias, name)
        return builder.build(), tuple(self._writes)

    def _owner(self, memory: Int64s) -> _Buffer:
        return next(buffer for buffer in self._buffers if np.may_share_memory(buffer.ids, memory))
