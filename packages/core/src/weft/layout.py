"""Layouts: what one kind of rank holds, in the coordinates of the logical model.

A layout is free of addresses, hosts and rank numbers, so equal ranks share one. It is immutable, content-addressed
(`Layout.address`) and kept in columns: a rank of a large model has tens of thousands of pieces. Make one with
`LayoutBuilder`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from weft.box import Affine, Box, boxes_from_views, refines, row_major
from weft.errors import LayoutError, RecordError

Int64s = npt.NDArray[np.int64]
FORMAT_VERSION = 1

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "bfloat16": 2, "float16": 2, "int16": 2, "float32": 4, "int32": 4, "float64": 8, "int64": 8,
}  # fmt: skip
"""Bytes per element of every dtype weft moves; names are torch's without the prefix."""


class Kind(StrEnum):
    """Who owns the memory of a buffer, and when it exists."""

    LIVE = "live"
    """The engine's or trainer's own; stays at its address for the whole memory epoch."""
    PRODUCED = "produced"
    """Made on demand at the source (merged, gathered, dequantized)."""
    SCRATCH = "scratch"
    """Landing space for one group at a target, in an arena that is kept; overwritten by later groups."""


class LogicalTensor(msgspec.Struct, frozen=True, array_like=True):
    """A whole tensor as stored on disk in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """The dtype this side holds it in; a difference between sides must be declared as a cast."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Buffer(msgspec.Struct, frozen=True, array_like=True):
    """A named, dense block of memory on one rank."""

    name: str
    dtype: str
    numel: int
    """Size in elements."""
    kind: Kind
    group: int
    """Index into `Layout.groups`: the tensors that land (or are produced) together."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor and the strided view of a buffer where it sits."""

    tensor: str
    box: Box
    buffer: str
    offset: int
    """Element of the buffer that holds the box's first element."""
    strides: tuple[int, ...]
    """Elements of the buffer per step of each factor of the box."""


class Fill(msgspec.Struct, frozen=True, array_like=True):
    """Part of a buffer that carries no logical tensor: padding. At a target it must hold `value`; at a source it is
    not sent.
    """

    buffer: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    value: float


class Tie(msgspec.Struct, frozen=True, array_like=True):
    """Two names of one logical tensor: `alias` has the values of `name`."""

    alias: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PieceTable:
    """Pieces in columns. Factor columns are padded on the left to the widest split with factor 1, range 0:1, stride
    0.
    """

    tensor: Int64s
    """Index into `Layout.tensors`, shape (n,)."""
    buffer: Int64s
    """Index into `Layout.buffers`, shape (n,)."""
    offset: Int64s
    """Elements, shape (n,)."""
    factors: Int64s
    """Shape (n, k)."""
    lo: Int64s
    """Shape (n, k)."""
    hi: Int64s
    """Shape (n, k)."""
    strides: Int64s
    """Elements of the buffer, shape (n, k)."""

    def __len__(self) -> int:
        return len(self.tensor)

    @classmethod
    def pack(cls, rows: Sequence[tuple[int, int, int, Box, tuple[int, ...]]]) -> PieceTable:
        """From rows of (tensor index, buffer index, offset, box, strides)."""
        width = max((len(row[3].factors) for row in rows), default=0)

        def column(values: Sequence[Sequence[int]], pad: int) -> Int64s:
            padded = [[pad] * (width - len(value)) + list(value) for value in values]
            return np.array(padded, dtype=np.int64).reshape(len(rows), width)

        return cls(
            tensor=np.array([row[0] for row in rows], dtype=np.int64),
            buffer=np.array([row[1] for row in rows], dtype=np.int64),
            offset=np.array([row[2] for row in rows], dtype=np.int64),
            factors=column([row[3].factors for row in rows], 1),
            lo=column([row[3].lo for row in rows], 0),
            hi=column([row[3].hi for row in rows], 1),
            strides=column([row[4] for row in rows], 0),
        )

    @property
    def numel(self) -> Int64s:
        """Elements per piece, shape (n,)."""
        elements: Int64s = np.prod(self.hi - self.lo, axis=1, dtype=np.int64)
        return elements

    def columns(self) -> dict[str, bytes]:
        """Little-endian int64 bytes of every column, for records."""
        names = ("tensor", "buffer", "offset", "factors", "lo", "hi", "strides")
        return {name: np.ascontiguousarray(getattr(self, name), dtype="<i8").tobytes() for name in names}

    @classmethod
    def from_columns(cls, columns: Mapping[str, bytes], width: int) -> PieceTable:
        """Inverse of `columns`. Raises `RecordError` when lengths disagree."""
        try:
            flat = {
                name: np.frombuffer(columns[name], dtype="<i8").astype(np.int64)
                for name in ("tensor", "buffer", "offset")
            }
            if width < 0:
                raise ValueError(f"width is {width}")
            count = len(flat["tensor"])
            wide = {
                name: np.frombuffer(columns[name], dtype="<i8").astype(np.int64).reshape(count, width)
                for name in ("factors", "lo", "hi", "strides")
            }
            if {len(column) for column in flat.values()} != {count}:
                raise ValueError("columns of different lengths")
        except (KeyError, ValueError) as error:
            raise RecordError(f"piece table is damaged: {error}") from error
        return cls(**flat, **wide)


class _LayoutRecord(msgspec.Struct, array_like=True):
    """What crosses a process boundary. New fields go to the end, with defaults."""

    format: int
    tensors: list[LogicalTensor]
    groups: list[str]
    buffers: list[Buffer]
    fills: list[Fill]
    ties: list[Tie]
    skipped: list[tuple[str, str]]
    scratch_slots: int
    width: int
    columns: dict[str, bytes]


@dataclass(frozen=True, eq=False)
class Layout:
    """Buffers, pieces, fills and ties of one kind of rank. Equal when their addresses are."""

    tensors: tuple[LogicalTensor, ...]
    groups: tuple[str, ...]
    """Names of the groups, in the order they move."""
    buffers: tuple[Buffer, ...]
    pieces: PieceTable
    fills: tuple[Fill, ...] = ()
    ties: tuple[Tie, ...] = ()
    skipped: tuple[tuple[str, str], ...] = field(default=())
    """(name, reason) of local tensors that are left out on purpose, such as rotary caches."""
    scratch_slots: int = 1
    """Scratch groups in flight: scratch group g shares memory with scratch group g - scratch_slots."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __repr__(self) -> str:
        return (
            f"Layout({len(self.tensors)} tensors, {len(self.buffers)} buffers, {len(self.pieces)} pieces, "
            f"{len(self.groups)} groups, {self.address[:12]})"
        )

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as objects, for people and tests; the planner reads the columns."""
        table = self.pieces
        for n in range(len(table)):
            tensor = self.tensors[table.tensor[n]]
            pad = _padding(table.factors[n], tensor.shape)
            factors, lo, hi, strides = (
                tuple(int(x) for x in column[n, pad:]) for column in (table.factors, table.lo, table.hi, table.strides)
            )
            buffer = self.buffers[table.buffer[n]].name
            yield Piece(tensor.name, Box(factors, lo, hi), buffer, int(table.offset[n]), strides)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel * ITEM_BYTES[buffer.dtype] for buffer in self.buffers)

    @cached_property
    def encoded(self) -> bytes:
        """The layout as a record: equal layouts give equal bytes."""
        return msgspec.msgpack.encode(
            _LayoutRecord(
                FORMAT_VERSION, list(self.tensors), list(self.groups), list(self.buffers), list(self.fills),
                list(self.ties), list(self.skipped), self.scratch_slots, self.pieces.factors.shape[1],
                self.pieces.columns(),
            )
        )  # fmt: skip

    @cached_property
    def address(self) -> str:
        """SHA-256 of `encoded`, in hex."""
        return hashlib.sha256(self.encoded).hexdigest()

    @classmethod
    def decode(cls, data: bytes) -> Layout:
        """Inverse of `encoded`. Raises `RecordError` when the bytes are not a layout of this format version."""
        try:
            record = msgspec.msgpack.decode(data, type=_LayoutRecord)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RecordError(f"not a layout record: {error}") from error
        if record.format != FORMAT_VERSION:
            raise RecordError(f"layout record has format {record.format}, this weft reads {FORMAT_VERSION}")
        layout = cls(
            tuple(record.tensors), tuple(record.groups), tuple(record.buffers),
            PieceTable.from_columns(record.columns, record.width), tuple(record.fills), tuple(record.ties),
            tuple(record.skipped), record.scratch_slots,
        )  # fmt: skip
        damage = _damage(layout)
        if damage:
            raise RecordError(f"layout record is damaged: {damage}")
        return layout


def _damage(layout: Layout) -> str | None:
    """What a decoded layout says that no builder would have let through. Looks at columns, since pieces are many."""
    buffers = {buffer.name: buffer for buffer in layout.buffers}
    names = {tensor.name for tensor in layout.tensors}
    if len(buffers) < len(layout.buffers) or len(names) < len(layout.tensors):
        return "two buffers or two tensors have one name"
    if any(t.dtype not in ITEM_BYTES or min(t.shape, default=0) < 0 for t in layout.tensors):
        return "a tensor has an unknown dtype or a negative size"
    if any(_buffer_fault(b) or not 0 <= b.group < len(layout.groups) for b in layout.buffers):
        return "a buffer has an unknown dtype, a negative size or no group"
    if layout.scratch_slots < 1 or any(_fill_fault(fill, buffers) for fill in layout.fills):
        return "a fill leaves its buffer, or there is no scratch slot"
    table = layout.pieces
    for column, count in ((table.tensor, len(layout.tensors)), (table.buffer, len(layout.buffers))):
        if len(column) and not 0 <= column.min() <= column.max() < count:
            return "a piece refers to a tensor or buffer that is not there"
    splits = np.unique(np.concatenate([table.tensor[:, None], table.factors], axis=1), axis=0).tolist()
    if not all(refines(split[1:], layout.tensors[split[0]].shape) for split in splits):
        return "the split of a piece does not refine its tensor"
    within = ((table.lo >= 0) & (table.lo < table.hi) & (table.hi <= table.factors) & (table.strides >= 0)).all(axis=1)
    # In floats, which do not wrap; they are exact far beyond the size of any buffer.
    reach = table.offset.astype(float) + ((table.hi - table.lo - 1.0) * table.strides).sum(axis=1)
    numel = np.array([buffer.numel for buffer in layout.buffers], dtype=float)[table.buffer]
    dtypes = [
        layout.tensors[t].dtype == layout.buffers[b].dtype for t, b in zip(table.tensor, table.buffer, strict=True)
    ]
    if not (within & (table.offset >= 0) & (reach < numel)).all() or not all(dtypes):
        return "a piece leaves its tensor or its buffer, or has another dtype than they"
    return None


def _buffer_fault(buffer: Buffer) -> str | None:
    if buffer.dtype not in ITEM_BYTES:
        return f"buffer {buffer.name}: dtype {buffer.dtype!r} is none of {', '.join(ITEM_BYTES)}"
    return f"buffer {buffer.name}: {buffer.numel} elements" if buffer.numel < 0 else None


def _fill_fault(fill: Fill, buffers: Mapping[str, Buffer]) -> str | None:
    where = f"fill of buffer {fill.buffer}"
    known = buffers.get(fill.buffer)
    if known is None:
        return f"{where}: there is no such buffer"
    if len(fill.sizes) != len(fill.strides) or any(n < 1 for n in fill.sizes) or any(n < 0 for n in fill.strides):
        return f"{where}: sizes {fill.sizes} and strides {fill.strides} must be equally many, positive and not negative"
    last = fill.offset + sum((n - 1) * step for n, step in zip(fill.sizes, fill.strides, strict=True))
    if fill.offset < 0 or last >= known.numel:
        return f"{where}: elements {fill.offset}..{last} do not lie in its {known.numel} elements"
    return None


def _padding(factors: Int64s, shape: tuple[int, ...]) -> int:
    """How many leading padding factors a row has: as many leading ones as leave the real split of `shape`."""
    pad = 0
    while pad < len(factors) and factors[pad] == 1 and refines([int(x) for x in factors[pad + 1 :]], shape):
        pad += 1
    return pad


class LayoutBuilder:
    """Collects buffers and pieces of one rank and checks them as a whole.

    >>> builder = LayoutBuilder()
    >>> builder.tensor("mlp.weight", (8, 4), "bfloat16")
    >>> builder.buffer("mlp.weight", "bfloat16", 16, group="layers.0")
    >>> builder.shard("mlp.weight", "mlp.weight", axis=0, start=4, stop=8)   # rows 4:8, dense in the buffer
    >>> builder.build()
    Layout(1 tensors, 1 buffers, 1 pieces, 1 groups, ...)
    """

    def __init__(self, *, scratch_slots: int = 1) -> None:
        self._tensors: dict[str, LogicalTensor] = {}
        self._groups: dict[str, int] = {}
        self._buffers: dict[str, Buffer] = {}
        self._buffer_index: dict[str, int] = {}
        self._tensor_index: dict[str, int] = {}
        self._rows: list[tuple[int, int, int, Box, tuple[int, ...]]] = []
        self._fills: list[Fill] = []
        self._ties: list[Tie] = []
        self._skipped: list[tuple[str, str]] = []
        self._scratch_slots = scratch_slots
        self._faults: list[str] = []

    def tensor(self, name: str, shape: Sequence[int], dtype: str) -> None:
        """Declare a logical tensor; declaring it again with the same shape and dtype is allowed."""
        tensor = LogicalTensor(name, tuple(int(n) for n in shape), dtype)
        known = self._tensors.setdefault(name, tensor)
        if known != tensor:
            self._faults.append(f"{name}: declared as {known.dtype}{known.shape} and as {dtype}{tensor.shape}")
        if dtype not in ITEM_BYTES:
            self._faults.append(f"{name}: dtype {dtype!r} is none of {', '.join(ITEM_BYTES)}")
        if min(tensor.shape, default=0) < 0:
            self._faults.append(f"{name}: shape {tensor.shape} has a negative size")
        self._tensor_index.setdefault(name, len(self._tensor_index))

    def buffer(self, name: str, dtype: str, numel: int, *, group: str, kind: Kind = Kind.LIVE) -> None:
        """Declare a block of memory of `numel` elements. Groups move in the order in which they are first named."""
        if name in self._buffers:
            self._faults.append(f"buffer {name}: declared twice")
        index = self._groups.setdefault(group, len(self._groups))
        self._buffers[name] = Buffer(name, dtype, int(numel), kind, index)
        self._buffer_index.setdefault(name, len(self._buffer_index))

    def piece(self, tensor: str, box: Box, buffer: str, offset: int, strides: Sequence[int]) -> None:
        """Say that `box` of `tensor` sits in `buffer` from element `offset`, with these strides per factor."""
        if tensor not in self._tensors or buffer not in self._buffers:
            self._faults.append(f"piece of {tensor} in {buffer}: declare both first")
            return
        self._rows.append((self._tensor_index[tensor], self._buffer_index[buffer], int(offset), box, tuple(strides)))

    def view(self, tensor: str, logical: Affine, buffer: str, memory: Affine) -> None:
        """Say that a strided view of the flattened tensor sits in a strided view of the buffer (see
        `boxes_from_views`).
        """
        if tensor not in self._tensors:
            self._faults.append(f"view of {tensor} in {buffer}: declare the tensor first")
            return
        try:
            boxes = boxes_from_views(self._tensors[tensor].shape, logical, memory)
        except LayoutError as error:
            self._faults += [f"{tensor} in buffer {buffer}: {fault}" for fault in error.faults]
            return
        for box, offset, strides in boxes:
            self.piece(tensor, box, buffer, offset, strides)

    def shard(
        self, tensor: str, buffer: str, *, axis: int = 0, start: int = 0, stop: int | None = None, offset: int = 0
    ) -> None:
        """Say that `start:stop` of one axis, and the whole of the others, sits densely in `buffer` from element
        `offset`.
        """
        if tensor not in self._tensors:
            self._faults.append(f"shard of {tensor} in {buffer}: declare the tensor first")
            return
        shape = self._tensors[tensor].shape
        if not shape:
            self.piece(tensor, Box((), (), ()), buffer, offset, ())
            return
        stop = shape[axis] if stop is None and -len(shape) <= axis < len(shape) else stop
        if not -len(shape) <= axis < len(shape) or stop is None or start > stop:
            self._faults.append(f"{tensor} in buffer {buffer}: no shard {start}:{stop} of axis {axis} of {shape}")
            return
        lo, hi = [0] * len(shape), list(shape)
        lo[axis], hi[axis] = start, stop
        box = Box(shape, tuple(lo), tuple(hi))
        if box.numel > 0:
            self.piece(tensor, box, buffer, offset, row_major(box.sizes))

    def fill(self, buffer: str, offset: int, sizes: Sequence[int], strides: Sequence[int], value: float = 0.0) -> None:
        """Declare padding."""
        self._fills.append(Fill(buffer, int(offset), tuple(sizes), tuple(strides), float(value)))

    def tie(self, alias: str, name: str) -> None:
        """Declare that the checkpoint name `alias` is the tensor `name`."""
        self._ties.append(Tie(alias, name))

    def skip(self, name: str, reason: str) -> None:
        """Name a local tensor that is left out on purpose, and why."""
        self._skipped.append((name, reason))

    def build(self) -> Layout:
        """The layout. Raises `LayoutError` with every fault found: bounds, splits, dtypes, names."""
        names, buffers = list(self._tensors.values()), list(self._buffers.values())
        faults = list(self._faults)
        for tensor_index, buffer_index, offset, box, strides in self._rows:
            tensor, buffer = names[tensor_index], buffers[buffer_index]
            if not len(box.lo) == len(box.hi) == len(strides) == len(box.factors):
                where = f"{tensor.name} in buffer {buffer.name}"
                faults.append(f"{where}: lo, hi, strides and factors differ in length ({box!r}, strides {strides})")
                continue
            where = f"{tensor.name} {box} in buffer {buffer.name}"
            if not refines(box.factors, tensor.shape):
                faults.append(f"{where}: the split does not refine shape {tensor.shape}")
                continue
            if any(not 0 <= low < high <= size for low, high, size in zip(box.lo, box.hi, box.factors, strict=True)):
                faults.append(f"{where}: the range is empty or outside the tensor of shape {tensor.shape}")
            last = offset + sum((n - 1) * step for n, step in zip(box.sizes, strides, strict=True))
            if offset < 0 or any(step < 0 for step in strides) or last >= buffer.numel:
                faults.append(f"{where}: elements {offset}..{last} leave the buffer of {buffer.numel} elements")
            if buffer.dtype != tensor.dtype:
                faults.append(f"{where}: buffer holds {buffer.dtype}, the tensor is declared {tensor.dtype}")
        checks = [_buffer_fault(buffer) for buffer in buffers]
        checks += [_fill_fault(fill, self._buffers) for fill in self._fills]
        faults += [fault for fault in checks if fault]
        tied: dict[str, str] = {}
        for tie in self._ties:
            if tie.alias == tie.name or tied.setdefault(tie.alias, tie.name) != tie.name:
                faults.append(f"{tie.alias}: tied to {tie.name} and to {tied.get(tie.alias, 'itself')}")
        if self._scratch_slots < 1:
            faults.append(f"scratch_slots is {self._scratch_slots}, it must be at least 1")
        if faults:
            raise LayoutError(faults)
        return Layout(
            tuple(names), tuple(self._groups), tuple(buffers), PieceTable.pack(self._rows), tuple(self._fills),
            tuple(sorted(self._ties, key=lambda tie: tie.alias)), tuple(self._skipped), self._scratch_slots,
        )  # fmt: skip
