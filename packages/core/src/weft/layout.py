"""Layouts: what one kind of rank holds, in the coordinates of the logical model.

A layout is free of addresses, hosts and rank numbers, so equal ranks share one. It is immutable, content-addressed
(`Layout.address`) and kept in columns: a rank of a large model has tens of thousands of pieces. Make one with
`weft.builder.LayoutBuilder`.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from weft.box import Box, refines
from weft.errors import RecordError
from weft.formats import CHECKPOINT, Acceptance, Format, format_fault
from weft.records import decoded

Int64s = npt.NDArray[np.int64]
FORMAT_VERSION = 1
FORMATS_VERSION = 2
"""Of records that speak of formats: a reader that would overlook them must not try."""

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "bfloat16": 2, "float16": 2, "int16": 2, "float32": 4, "int32": 4, "float64": 8, "int64": 8,
}  # fmt: skip
"""Bytes per element of every dtype weft moves; names are torch's without the prefix."""

_INTEGERS = {
    "bool": (0, 1), "uint8": (0, 255), "int8": (-128, 127), "int16": (-(1 << 15), (1 << 15) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1), "int64": (-(1 << 63), (1 << 63) - 1),
}  # fmt: skip
_LARGEST = {
    "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "float8_e8m0fnu": 2.0**127, "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float16": 65504.0, "float32": (2 - 2.0**-23) * 2.0**127, "float64": sys.float_info.max,
}  # fmt: skip
"""Largest finite values (IEEE 754; Micikevicius et al., FP8 Formats for Deep Learning, 2022; OCP MX 1.0)."""


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
    formats: list[tuple[Format, list[int]]] = []
    """With the numbers of the tensors that have it; others are as on disk."""
    accepts: list[Acceptance] = []
    extra: list[tuple[int, dict[str, str]]] = []
    """By number of a tensor."""


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
    formats: Mapping[str, Format] = field(default_factory=dict)
    """By tensor, how its elements lie; of tensors that are not named they lie as on disk (`weft.formats.CHECKPOINT`).
    Formats must agree between the sides.
    """
    accepts: tuple[Acceptance, ...] = ()
    """Of a target: formats it takes its tensors in, besides those of `formats`."""
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By tensor, what else is to be said of it: text to text, which weft keeps and never reads. It is part of the
    address, so it belongs to the memory epoch and not to a version; sides need not agree about it.
    """

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
    def scratch_groups(self) -> tuple[int, ...]:
        """Groups that land in scratch, in the order in which they move."""
        return tuple(sorted({buffer.group for buffer in self.buffers if buffer.kind is Kind.SCRATCH}))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel * ITEM_BYTES[buffer.dtype] for buffer in self.buffers)

    @cached_property
    def encoded(self) -> bytes:
        """The layout as a record: equal layouts give equal bytes. What nobody says of any tensor takes none."""
        numbers = {tensor.name: n for n, tensor in enumerate(self.tensors)} if self.formats or self.extra else {}
        sharing: dict[Format, list[int]] = {}
        for name in sorted(self.formats, key=numbers.__getitem__):
            if self.formats[name] != CHECKPOINT:
                sharing.setdefault(self.formats[name], []).append(numbers[name])
        values = [
            FORMATS_VERSION if sharing or self.accepts else FORMAT_VERSION, self.tensors, self.groups, self.buffers,
            self.fills, self.ties, self.skipped, self.scratch_slots, self.pieces.factors.shape[1],
            self.pieces.columns(), [(_sorted(format), where) for format, where in sharing.items()],
            [_sorted(each) for each in self.accepts],
            sorted((numbers[name], dict(sorted(said.items()))) for name, said in self.extra.items() if said),
        ]  # fmt: skip
        while not values[-1]:  # the columns are never empty
            values.pop()
        return msgspec.msgpack.encode(values)

    @cached_property
    def address(self) -> str:
        """SHA-256 of `encoded`, in hex."""
        return hashlib.sha256(self.encoded).hexdigest()

    @classmethod
    def decode(cls, data: bytes) -> Layout:
        """Inverse of `encoded`. Raises `RecordError` when the bytes are not a layout of a known format version."""
        record = decoded(_LayoutRecord, data, "not a layout record")
        if record.format not in (FORMAT_VERSION, FORMATS_VERSION):
            raise RecordError(f"layout record has format {record.format}, this weft reads {FORMATS_VERSION}")
        numbers = [n for _, where in record.formats for n in where], [n for n, _ in record.extra]
        if any(len(set(found)) < len(found) or not set(found) <= set(range(len(record.tensors))) for found in numbers):
            raise RecordError(
                "layout record is damaged: a format or an extra is of a tensor that is not there, or twice"
            )
        layout = cls(
            tuple(record.tensors), tuple(record.groups), tuple(record.buffers),
            PieceTable.from_columns(record.columns, record.width), tuple(record.fills), tuple(record.ties),
            tuple(record.skipped), record.scratch_slots,
            {record.tensors[n].name: format for format, where in record.formats for n in where},
            tuple(record.accepts), {record.tensors[n].name: said for n, said in record.extra},
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
    if any(tie.alias in names for tie in layout.ties):
        return "a tied name is a tensor of its own"
    if any(t.dtype not in ITEM_BYTES or min(t.shape, default=0) < 0 for t in layout.tensors):
        return "a tensor has an unknown dtype or a negative size"
    if any(buffer_fault(b) or not 0 <= b.group < len(layout.groups) for b in layout.buffers):
        return "a buffer has an unknown dtype, a negative size or no group"
    if layout.scratch_slots < 1 or any(fill_fault(fill, buffers) for fill in layout.fills):
        return "a fill leaves its buffer, or there is no scratch slot"
    if any(map(format_fault, set(layout.formats.values()))) or not all(each.format for each in layout.accepts):
        return "a format has no name, or metadata that it must not have"
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


def _sorted(of: Format | Acceptance) -> Format | Acceptance:
    """With its metadata in order."""
    return msgspec.structs.replace(of, metadata=dict(sorted(of.metadata.items())))


def buffer_fault(buffer: Buffer) -> str | None:
    """What is wrong with a buffer by itself, or None."""
    if buffer.dtype not in ITEM_BYTES:
        return f"buffer {buffer.name}: dtype {buffer.dtype!r} is none of {', '.join(ITEM_BYTES)}"
    return f"buffer {buffer.name}: {buffer.numel} elements" if buffer.numel < 0 else None


def fill_fault(fill: Fill, buffers: Mapping[str, Buffer]) -> str | None:
    """What is wrong with a fill of one of these buffers, or None."""
    where = f"fill of buffer {fill.buffer}"
    known = buffers.get(fill.buffer)
    if known is None:
        return f"{where}: there is no such buffer"
    if len(fill.sizes) != len(fill.strides) or any(n < 1 for n in fill.sizes) or any(n < 0 for n in fill.strides):
        return f"{where}: sizes {fill.sizes} and strides {fill.strides} must be equally many, positive and not negative"
    last = fill.offset + sum((n - 1) * step for n, step in zip(fill.sizes, fill.strides, strict=True))
    if fill.offset < 0 or last >= known.numel:
        return f"{where}: elements {fill.offset}..{last} do not lie in its {known.numel} elements"
    if not _holds(known.dtype, fill.value):
        return f"{where}: {known.dtype} cannot hold {fill.value}"
    return None


def _holds(dtype: str, value: float) -> bool:
    """Whether a value is in the range of a dtype, which may round it; of integers, whether it is one."""
    if dtype in _INTEGERS:
        low, high = _INTEGERS[dtype]
        return math.isfinite(value) and value == int(value) and low <= int(value) <= high
    return dtype not in _LARGEST or not math.isfinite(value) or abs(value) <= _LARGEST[dtype]


def _padding(factors: Int64s, shape: tuple[int, ...]) -> int:
    """How many leading padding factors a row has: as many leading ones as leave the real split of `shape`."""
    pad = 0
    while pad < len(factors) and factors[pad] == 1 and refines([int(x) for x in factors[pad + 1 :]], shape):
        pad += 1
    return pad
