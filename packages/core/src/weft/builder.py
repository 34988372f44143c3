"""Building layouts: what adapters say about one rank, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weft.box import Affine, Box, boxes_from_views, refines, row_major
from weft.errors import LayoutError
from weft.formats import CHECKPOINT, Acceptance, Format, format_fault
from weft.layout import (
    ITEM_BYTES,
    Buffer,
    Fill,
    Kind,
    Layout,
    LogicalTensor,
    PieceTable,
    Tie,
    buffer_fault,
    fill_fault,
)


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
        self._formats: dict[str, Format] = {}
        self._extra: dict[str, dict[str, str]] = {}
        self._accepts: list[Acceptance] = []
        self._faults: list[str] = []

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        *,
        format: Format = CHECKPOINT,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Declare a logical tensor; declaring it again with the same shape, dtype, format and extra is allowed.

        `format` says how its elements lie (`Layout.formats`), `extra` is text that weft keeps (`Layout.extra`).
        """
        tensor = LogicalTensor(name, tuple(int(n) for n in shape), dtype)
        known = self._tensors.setdefault(name, tensor)
        if known != tensor:
            self._faults.append(f"{name}: declared as {known.dtype}{known.shape} and as {dtype}{tensor.shape}")
        self._describe(name, format, dict(extra or {}))
        if dtype not in ITEM_BYTES:
            self._faults.append(f"{name}: dtype {dtype!r} is none of {', '.join(ITEM_BYTES)}")
        if min(tensor.shape, default=0) < 0:
            self._faults.append(f"{name}: shape {tensor.shape} has a negative size")
        self._tensor_index.setdefault(name, len(self._tensor_index))

    def _describe(self, name: str, format: Format, extra: dict[str, str]) -> None:
        again = name in self._tensor_index
        known, said = self._formats.get(name, CHECKPOINT), self._extra.get(name, {})
        if again and known != format:
            self._faults.append(f"{name}: declared in format {known} and in {format}")
        if again and said != extra:
            self._faults.append(f"{name}: declared with extra {said} and with {extra}")
        if fault := format_fault(format):
            self._faults.append(f"{name}: {fault}")
        if format != CHECKPOINT:
            self._formats[name] = format
        if extra:
            self._extra[name] = extra

    def accept(self, format: str, metadata: Mapping[str, Sequence[str]] | None = None) -> None:
        """Of a target: say that tensors may come in this format, too. `metadata`: per key, which values; none: any."""
        if not format:
            self._faults.append("a format that is accepted needs a name")
        self._accepts.append(Acceptance(format, {key: tuple(values) for key, values in (metadata or {}).items()}))

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
        checks = [buffer_fault(buffer) for buffer in buffers]
        checks += [fill_fault(fill, self._buffers) for fill in self._fills]
        faults += [fault for fault in checks if fault]
        tied: dict[str, str] = {}
        for tie in self._ties:
            if tie.alias == tie.name or tied.setdefault(tie.alias, tie.name) != tie.name:
                faults.append(f"{tie.alias}: tied to {tie.name} and to {tied.get(tie.alias, 'itself')}")
            if tie.alias in self._tensors:
                faults.append(f"{tie.alias}: tied to {tie.name} and declared as a tensor of its own")
        if self._scratch_slots < 1:
            faults.append(f"scratch_slots is {self._scratch_slots}, it must be at least 1")
        if faults:
            raise LayoutError(faults)
        return Layout(
            tuple(names), tuple(self._groups), tuple(buffers), PieceTable.pack(self._rows), tuple(self._fills),
            tuple(sorted(self._ties, key=lambda tie: tie.alias)), tuple(self._skipped), self._scratch_slots,
            self._formats, tuple(self._accepts), self._extra,
        )  # fmt: skip
