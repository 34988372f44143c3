"""Views of memory, and the one-process execution of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from weft.box import Box
from weft.copies import Copies
from weft.layout import Fill, Layout, Piece
from weft.plan import Plan

Memory = Mapping[str, torch.Tensor]
"""The memory of every buffer of a layout: dense one-dimensional tensors."""


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a layout's dtype name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def source_view(copies: Copies, n: int, buffer: torch.Tensor) -> torch.Tensor:
    """Copy n's elements in the source's buffer, as a strided view of shape `copies.sizes[n]`."""
    return buffer.as_strided(
        copies.sizes[n].tolist(),
        copies.source_strides[n].tolist(),
        buffer.storage_offset() + int(copies.source_offset[n]),
    )


def target_view(copies: Copies, n: int, buffer: torch.Tensor) -> torch.Tensor:
    """Copy n's elements in the target's buffer, as a strided view of shape `copies.sizes[n]`."""
    return buffer.as_strided(
        copies.sizes[n].tolist(),
        copies.target_strides[n].tolist(),
        buffer.storage_offset() + int(copies.target_offset[n]),
    )


def piece_view(piece: Piece, memory: Memory) -> torch.Tensor:
    """Where a piece's box sits in memory, as a strided view of shape `piece.box.sizes`."""
    buffer = memory[piece.buffer]
    return buffer.as_strided(piece.box.sizes, piece.strides, buffer.storage_offset() + piece.offset)


def box_view(box: Box, whole: torch.Tensor) -> torch.Tensor:
    """A box of a dense whole tensor, as a strided view of shape `box.sizes`."""
    return whole.as_strided(box.sizes, box.flat_strides, whole.storage_offset() + box.flat_start)


def fill_view(fill: Fill, buffer: torch.Tensor) -> torch.Tensor:
    """The padding of one fill, as a strided view."""
    return buffer.as_strided(fill.sizes, fill.strides, buffer.storage_offset() + fill.offset)


def apply_fills(layout: Layout, memory: Memory, group: int) -> None:
    """Write the padding of one group's buffers."""
    buffers = {buffer.name: buffer.group for buffer in layout.buffers} if layout.fills else {}
    for fill in layout.fills:
        if buffers[fill.buffer] == group:
            fill_view(fill, memory[fill.buffer]).fill_(fill.value)


def execute(
    plan: Plan, layouts: Mapping[str, Layout], sources: Mapping[str, Memory], targets: Mapping[str, Memory]
) -> None:
    """Carry out a whole plan in this process: every copy, every fill. `sources` and `targets` are memories by member
    name.

    For tests, tools and small jobs; real refits move buckets through a transport.
    """
    for n, source, target, source_buffer, target_buffer in _ends(plan, layouts):
        view = target_view(plan.copies, n, targets[target][target_buffer])
        held = sources[source] if source in sources else targets[source]
        view.copy_(source_view(plan.copies, n, held[source_buffer]))
    for name, memory in targets.items():
        layout = layouts[plan.members[plan.index(name)].target_layout or ""]
        for group in range(len(layout.groups)):
            apply_fills(layout, memory, group)


def _ends(plan: Plan, layouts: Mapping[str, Layout]) -> Iterator[tuple[int, str, str, str, str]]:
    """(copy, sender, target member, sender's buffer, target's buffer) of every copy; what is passed on comes last, and
    in the order of replicas: into each of them from those before, then within it.
    """
    copies = plan.copies
    replicas = np.array([member.replica or member.name for member in plan.members])
    passed_on = ~np.array([member.is_source for member in plan.members])[copies.source]
    into = replicas[copies.target]
    within = replicas[copies.source] == into
    for n in np.lexsort((passed_on & within, np.where(passed_on, into, ""), passed_on)).tolist():
        source, target = plan.members[copies.source[n]], plan.members[copies.target[n]]
        held, wanted = layouts[source.sends_from or ""], layouts[target.target_layout or ""]
        yield (
            n, source.name, target.name,
            held.buffers[copies.source_buffer[n]].name, wanted.buffers[copies.target_buffer[n]].name,
        )  # fmt: skip


def byte_view(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The memory of a dense CPU tensor as an array of bytes that shares it."""
    return np.asarray(tensor.detach().reshape(-1).view(torch.uint8).numpy())
