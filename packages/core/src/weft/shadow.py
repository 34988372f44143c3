"""Shadow memory: a version lands beside the weights that are served, which then take it over into stable addresses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

from weft.errors import ConfigError
from weft.layout import ITEM_BYTES, Layout, Piece
from weft.policy import Policy
from weft.views import Memory, piece_view, torch_dtype

_ALIGNMENT = 256
"""Bytes: whatever copies wide words finds them aligned."""
_MEMINFO = Path("/proc/meminfo")

Flip = tuple[torch.Tensor, torch.Tensor]
"""(served, shadow) views of equal shape."""


class Shadow:
    """Memory for every buffer of a target's layout: one allocation, in which no group shares anything with another."""

    def __init__(self, layout: Layout, served: Memory, policy: Policy) -> None:
        """Allocates. Raises `ConfigError` when the memory is not there."""
        self.nbytes = shadow_bytes(layout)
        """Size of the allocation."""
        device = torch.device("cpu")
        if policy.landing == "shadow" and served:
            device = next(iter(served.values())).device
        _check(self.nbytes, device)
        pinned = device.type == "cpu" and any(memory.is_cuda for memory in served.values())
        self.memory: Memory = beside(layout, device, pinned=pinned)
        """Where a version lands: by buffer, as `Target.memory` gives those that are served."""
        self._flips = self._views(layout, served, policy)

    def flip(self, group: int) -> None:
        """Copy what has landed for one group over what is served."""
        for served, shadow in self._flips[group]:
            served.copy_(shadow)

    def _views(self, layout: Layout, served: Memory, policy: Policy) -> dict[int, list[Flip]]:
        """Whole buffers where every element moves, else what moves: the rest stays as it is."""
        pieces: defaultdict[str, list[Piece]] = defaultdict(list)
        for piece in layout:
            if policy.moves(piece.tensor):
                pieces[piece.buffer].append(piece)
        flips: dict[int, list[Flip]] = {group: [] for group in range(len(layout.groups))}
        for buffer in layout.buffers:
            moved = pieces[buffer.name]
            flips[buffer.group] += (
                [(served[buffer.name], self.memory[buffer.name])]
                if sum(piece.box.numel for piece in moved) == buffer.numel
                else _piecewise(moved, served, self.memory)
            )
        return flips


def beside(layout: Layout, device: torch.device, *, pinned: bool) -> dict[str, torch.Tensor]:
    """Memory for every buffer of a layout, by name: parts of one allocation of `shadow_bytes(layout)`, all apart."""
    sizes = _sizes(layout)
    arena = torch.empty(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
    return {
        b.name: arena[start : start + b.numel * ITEM_BYTES[b.dtype]].view(torch_dtype(b.dtype))
        for b, start in zip(layout.buffers, accumulate([0, *sizes[:-1]]), strict=True)
    }


def shadow_bytes(layout: Layout) -> int:
    """What `Shadow` allocates for a layout."""
    return sum(_sizes(layout))


def _sizes(layout: Layout) -> list[int]:
    return [-(-buffer.numel * ITEM_BYTES[buffer.dtype] // _ALIGNMENT) * _ALIGNMENT for buffer in layout.buffers]


def _piecewise(pieces: Sequence[Piece], served: Memory, shadow: Memory) -> list[Flip]:
    return [(piece_view(piece, served), piece_view(piece, shadow)) for piece in pieces]


def _check(nbytes: int, device: torch.device) -> None:
    """Raise `ConfigError` when there is less memory: later it would be an allocation failure in the engine."""
    available = available_bytes(device)
    if available is not None and nbytes > available:
        on_host = ' or "shadow_on_host"' if device.type != "cpu" else ""
        raise ConfigError(
            f'landing "shadow" needs {nbytes} bytes on {device} beside the weights that are served, and {available} '
            f'are available: use landing "in_place"{on_host}, or move fewer tensors (Policy.only)'
        )


def available_bytes(device: torch.device) -> int | None:
    """What can still be allocated; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10
