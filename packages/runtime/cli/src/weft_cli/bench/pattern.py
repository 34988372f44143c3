"""Weights that anybody can make again: pseudo-random bits per tensor and version, and what is wrong in a memory."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from weft.layout import ITEM_BYTES, Layout
from weft.views import box_view, piece_view

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def logical(name: str, shape: tuple[int, ...], dtype: str, version: int) -> torch.Tensor:
    """A whole logical tensor of a version, as integers of its dtype's width: positive, so that no bits are a NaN."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + version)
    integer = _INTEGER[ITEM_BYTES[dtype]]
    return torch.randint(0, 100, shape, generator=generator, dtype=integer)


def fill(layout: Layout, memory: Mapping[str, torch.Tensor], version: int) -> None:
    """Put a version into a source's memory."""
    _visit(layout, memory, version, compare=False)


def wrong_bytes(layout: Layout, memory: Mapping[str, torch.Tensor], version: int) -> int:
    """Bytes of a target's memory that are not the version's. Slices the logical tensors directly, without a plan."""
    return _visit(layout, memory, version, compare=True)


def _visit(layout: Layout, memory: Mapping[str, torch.Tensor], version: int, *, compare: bool) -> int:
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    wrong, name, whole = 0, "", torch.empty(0)
    for piece in sorted(layout, key=lambda piece: piece.tensor):
        if piece.tensor != name:
            name = piece.tensor
            whole = logical(name, tensors[name].shape, tensors[name].dtype, version)
        part, place = box_view(piece.box, whole), piece_view(piece, memory).view(whole.dtype)
        if compare:
            wrong += int((place != part).sum()) * part.element_size()
        else:
            place.copy_(part)
    return wrong
