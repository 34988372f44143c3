"""What one rank holds, compared with whole tensors: by digest, and by bytes where digests differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from weft.box import Box, row_major
from weft.contracts import Source
from weft.digest import Digest, Runs, tensor_seed
from weft.errors import ConfigError
from weft.formats import CHECKPOINT
from weft.layout import Kind, Layout, LogicalTensor, Piece
from weft.policy import Policy
from weft.views import box_view, byte_view, fill_view, piece_view, torch_dtype

_EXAMPLES = 3
"""Differing elements that are shown with their values, per box."""
_IN_SCRATCH = "the engine keeps it in its kernels' own format; it lies in weft's scratch memory only while it lands"


class Part(msgspec.Struct, frozen=True):
    """A box of a tensor that was read from a rank's memory."""

    factors: tuple[int, ...]
    lo: tuple[int, ...]
    hi: tuple[int, ...]
    digest: str
    """Of the bits found, 32 hexadecimal digits."""


class Example(msgspec.Struct, frozen=True):
    """One element that differs; values with their bits."""

    index: tuple[int, ...]
    """In the whole tensor."""
    expected: str
    found: str


class Difference(msgspec.Struct, frozen=True):
    """A box that is not as in the checkpoint."""

    box: str
    buffer: str
    elements: int
    """In the box."""
    differing_elements: int
    differing_bytes: int
    examples: tuple[Example, ...]
    """The first ones, in the order of the box."""


class ComparedTensor(msgspec.Struct, frozen=True):
    """One tensor of one rank. Without `fault` and `unread`, `parts` were all compared."""

    name: str
    """The rank's name for it, or one that the rank ties to it."""
    reference: str
    """The checkpoint's name; empty when the checkpoint has no such tensor."""
    parts: tuple[Part, ...] = ()
    differences: tuple[Difference, ...] = ()
    bytes: int = 0
    """Compared."""
    fault: str = ""
    """Why it cannot be what the checkpoint holds: missing there, another shape, another dtype."""
    unread: str = ""
    """Why some of it could not be read."""
    unread_parts: tuple[Part, ...] = ()
    """That part of it; digests are empty."""


class RankComparison(msgspec.Struct, frozen=True):
    """Everything one rank holds against a checkpoint. Crosses process boundaries."""

    tensors: tuple[ComparedTensor, ...]
    padding: tuple[str, ...] = ()
    """Padding that does not hold its value, in words."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(name, reason) of local tensors that no checkpoint holds."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Whole tensors by their names on disk, in CPU memory, dense, and the names that are tied to them."""

    tensors: Mapping[str, torch.Tensor]
    ties: Mapping[str, str]

    @classmethod
    def of(cls, source: Source) -> Reference:
        """What a source holds, if it holds everything whole, as `weft_dtensor.CheckpointSource` does. Copies nothing.

        Raises `ConfigError` naming every tensor that is not one dense piece.
        """
        layout, memory = source.layout(), source.memory()
        pieces: dict[str, list[Piece]] = {}
        for piece in layout:
            pieces.setdefault(piece.tensor, []).append(piece)
        whole, faults = {}, []
        for tensor in layout.tensors:
            if tensor.numel == 0:
                whole[tensor.name] = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
                continue
            found = pieces.get(tensor.name, [])
            if len(found) != 1 or found[0].box.numel != tensor.numel or found[0].strides != found[0].box.flat_strides:
                faults.append(f"{tensor.name} is not one dense piece")
                continue
            start = found[0].offset
            whole[tensor.name] = memory[found[0].buffer][start : start + tensor.numel].view(tensor.shape)
        if faults:
            raise ConfigError(f"a reference must hold whole tensors: {'; '.join(faults)}")
        return cls(whole, {tie.alias: tie.name for tie in layout.ties})

    def name(self, name: str) -> str | None:
        """The name on disk behind a name, or None."""
        tied = self.ties.get(name, name)
        return name if name in self.tensors else tied if tied in self.tensors else None


def compare(
    layout: Layout,
    memory: Mapping[str, torch.Tensor],
    reference: Reference,
    policy: Policy,
    unread: Mapping[str, str] | None = None,
) -> RankComparison:
    """Compare every piece and every fill of a rank with the reference; reads memory, changes nothing.

    `memory` is as for `weft.contracts.Target.memory`, on any device. `policy` declares casts, which are applied to the
    reference. `unread` says why buffers (by name) cannot be read; scratch buffers, and those with tensors in a format
    of an engine's own, never can. Raises nothing for what it finds: all of it is in the result.
    """
    reasons = {buffer.name: _IN_SCRATCH for buffer in layout.buffers if buffer.kind is Kind.SCRATCH} | dict(
        unread or {}
    )
    pieces: dict[str, list[Piece]] = {tensor.name: [] for tensor in layout.tensors}
    for piece in layout:
        pieces[piece.tensor].append(piece)
        if (format := layout.formats.get(piece.tensor, CHECKPOINT)) != CHECKPOINT:
            reasons.setdefault(piece.buffer, f"it is in format {format}, which only its engine can read")
    aliases: dict[str, list[str]] = {}
    for tie in layout.ties:
        aliases.setdefault(tie.name, []).append(tie.alias)
    compared = tuple(
        _tensor(tensor, name, on_disk, pieces[tensor.name], memory, reference, policy, reasons)
        for tensor in layout.tensors
        for name, on_disk in _counterparts(tensor.name, aliases.get(tensor.name, []), reference)
    )
    return RankComparison(compared, tuple(_padding_faults(layout, memory, reasons)), layout.skipped)


def _counterparts(name: str, aliases: Sequence[str], reference: Reference) -> list[tuple[str, str]]:
    """(name here, name on disk) of every tensor on disk that one local tensor must equal; on disk "" if there is none.

    Names that are tied here may be tensors of their own on disk: then all of them must equal the one here.
    """
    found: dict[str, str] = {}
    for each in (name, *aliases):
        on_disk = reference.name(each)
        if on_disk is not None:
            found.setdefault(on_disk, each)
    return [(each, on_disk) for on_disk, each in found.items()] or [(name, "")]


def _tensor(
    tensor: LogicalTensor,
    name: str,
    on_disk: str,
    pieces: Sequence[Piece],
    memory: Mapping[str, torch.Tensor],
    reference: Reference,
    policy: Policy,
    reasons: Mapping[str, str],
) -> ComparedTensor:
    fault = _mismatch(tensor, reference.tensors.get(on_disk), policy)
    if fault:
        return ComparedTensor(name, on_disk, fault=fault)
    whole, parts, differences, nbytes = reference.tensors[on_disk], [], [], 0
    unread: dict[str, None] = {}
    unread_parts = []
    for piece in pieces:
        box = piece.box
        if piece.buffer in reasons:
            unread[f"{piece.buffer}: {reasons[piece.buffer]}"] = None
            unread_parts.append(Part(box.factors, box.lo, box.hi, ""))
            continue
        found = _dense(piece_view(piece, memory))
        expected = _dense(box_view(box, whole).to(found.dtype))
        digest = _digest(on_disk, found, box)
        parts.append(Part(box.factors, box.lo, box.hi, digest.hex()))
        nbytes += found.nbytes
        if digest != _digest(on_disk, expected, box):
            differences.append(_difference(tensor.shape, piece, found, expected))
    return ComparedTensor(
        name, on_disk, tuple(parts), tuple(differences), nbytes,
        unread="; ".join(unread), unread_parts=tuple(unread_parts),
    )  # fmt: skip


def _mismatch(tensor: LogicalTensor, whole: torch.Tensor | None, policy: Policy) -> str:
    if whole is None:
        return "the checkpoint has no such tensor"
    dtype = str(whole.dtype).removeprefix("torch.")
    if tuple(whole.shape) != tensor.shape:
        return f"the checkpoint has shape {list(whole.shape)}, here it has {list(tensor.shape)}"
    if dtype != tensor.dtype and (dtype, tensor.dtype) not in policy.casts:
        return (
            f"the checkpoint holds {dtype}, here it is {tensor.dtype}: declare the cast {dtype}:{tensor.dtype} if "
            "rounding is meant"
        )
    return ""


def _dense(view: torch.Tensor) -> torch.Tensor:
    """In CPU memory, row-major to the letter: axes of one element may have any stride otherwise."""
    held = view.contiguous().cpu()
    return held.as_strided(held.shape, row_major(held.shape), held.storage_offset())


def _digest(name: str, dense: torch.Tensor, box: Box) -> Digest:
    runs = Runs.of_nest(
        tensor_seed(name), dense.element_size(), 0, box.flat_start, box.sizes, row_major(box.sizes), box.flat_strides
    )
    return runs.digest(byte_view(dense))


def _difference(shape: tuple[int, ...], piece: Piece, found: torch.Tensor, expected: torch.Tensor) -> Difference:
    rows = (-1, found.element_size())
    differs = byte_view(found).reshape(rows) != byte_view(expected).reshape(rows)
    elements = differs.any(axis=1).nonzero()[0]
    examples = []
    for element in elements[:_EXAMPLES].tolist():
        flat = piece.box.flat_start + sum(
            i * step for i, step in zip(_place(element, piece.box.sizes), piece.box.flat_strides, strict=True)
        )
        values = (tensor.reshape(-1)[element] for tensor in (expected, found))
        examples.append(Example(_place(flat, shape), *(_value(value) for value in values)))
    return Difference(str(piece.box), piece.buffer, piece.box.numel, len(elements), int(differs.sum()), tuple(examples))


def _place(flat: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The index of element `flat` of a dense array."""
    return tuple(map(int, np.unravel_index(flat, sizes)))


def _value(element: torch.Tensor) -> str:
    number = element.float().item() if element.is_floating_point() and element.element_size() < 4 else element.item()
    return f"{number} (0x{byte_view(element)[::-1].tobytes().hex()})"


def _padding_faults(layout: Layout, memory: Mapping[str, torch.Tensor], reasons: Mapping[str, str]) -> Iterator[str]:
    for fill in layout.fills:
        if fill.buffer in reasons:
            continue
        found = _dense(fill_view(fill, memory[fill.buffer]))
        value = torch.full((), fill.value, dtype=found.dtype)
        rows = (-1, found.element_size())
        wrong = int((byte_view(found).reshape(rows) != byte_view(value)).any(axis=1).sum())
        if wrong:
            where = f"{fill.buffer}: {wrong} of {found.numel()} padding elements from {fill.offset} on"
            yield f"{where} do not hold {fill.value}"
