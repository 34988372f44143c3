"""A tiny model with everything that makes refits interesting: fused, strided and replicated tensors, several groups.

What a target must hold is said by slicing whole tensors, not by boxes, so that it can be compared with what boxes did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weft.builder import LayoutBuilder
from weft.layout import Kind, Layout
from weft.views import torch_dtype


@dataclass(frozen=True, slots=True)
class Tiny:
    """Shapes of a model. Sources hold gate, up and down apart; targets fuse gate and up, and pad the fused rows."""

    layers: int = 3
    hidden: int = 32
    inner: int = 48
    dtype: str = "bfloat16"
    norm_dtype: str = "bfloat16"
    """Of norms at the sources."""

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        """Random weights in the sources' dtypes."""
        random = torch.Generator().manual_seed(seed)
        shapes = {"gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner)}
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(self.layers):
            for name, shape in shapes.items():
                tensors[f"{layer}.{name}"] = torch.randn(shape, generator=random).to(torch_dtype(self.dtype))
            norm = torch.randn(self.hidden, generator=random).to(torch_dtype(self.norm_dtype))
            tensors[f"{layer}.norm"] = norm
        return tensors

    def source(self, rank: int, size: int) -> Layout:
        """Tensor-parallel rank of a trainer: rows of gate and up, columns of down, the whole norm."""
        builder = LayoutBuilder()
        start, stop = _share(self.inner, rank, size)
        for layer in range(self.layers):
            for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
                tensor = f"{layer}.{name}"
                shape = (self.hidden, self.inner) if axis else (self.inner, self.hidden)
                builder.tensor(tensor, shape, self.dtype)
                builder.buffer(tensor, self.dtype, (stop - start) * self.hidden, group=f"layer{layer}")
                builder.shard(tensor, tensor, axis=axis, start=start, stop=stop)
            builder.tensor(f"{layer}.norm", (self.hidden,), self.norm_dtype)
            builder.buffer(f"{layer}.norm", self.norm_dtype, self.hidden, group=f"layer{layer}")
            builder.shard(f"{layer}.norm", f"{layer}.norm")
        return builder.build()

    def target(self, rank: int, size: int, *, scratch_slots: int = 0) -> Layout:
        """Tensor-parallel rank of an engine; with `scratch_slots`, layers but the first land in scratch."""
        builder = LayoutBuilder(scratch_slots=max(1, scratch_slots))
        start, stop = _share(self.inner, rank, size)
        rows = stop - start
        for layer in range(self.layers):
            kind = Kind.SCRATCH if scratch_slots and layer else Kind.LIVE
            fused, down, norm = (f"layer{layer}.{name}" for name in ("gate_up", "down", "norm"))
            for name in ("gate", "up"):
                builder.tensor(f"{layer}.{name}", (self.inner, self.hidden), self.dtype)
            builder.buffer(fused, self.dtype, (2 * rows + 1) * self.hidden, group=f"layer{layer}", kind=kind)
            builder.shard(f"{layer}.gate", fused, start=start, stop=stop)
            builder.shard(f"{layer}.up", fused, start=start, stop=stop, offset=rows * self.hidden)
            builder.fill(fused, 2 * rows * self.hidden, (self.hidden,), (1,), 0.5)
            builder.tensor(f"{layer}.down", (self.hidden, self.inner), self.dtype)
            builder.buffer(down, self.dtype, rows * self.hidden, group=f"layer{layer}", kind=kind)
            builder.shard(f"{layer}.down", down, axis=1, start=start, stop=stop)
            builder.tensor(f"{layer}.norm", (self.hidden,), self.dtype)
            builder.buffer(norm, self.dtype, self.hidden, group=f"layer{layer}")
            builder.shard(f"{layer}.norm", norm)
        return builder.build()

    def expected(self, rank: int, size: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What every buffer of `target(rank, size)` holds, by slicing."""
        start, stop = _share(self.inner, rank, size)
        wanted: dict[str, torch.Tensor] = {}
        for layer in range(self.layers):
            pad = torch.full((1, self.hidden), 0.5, dtype=torch_dtype(self.dtype))
            fused = torch.cat([tensors[f"{layer}.gate"][start:stop], tensors[f"{layer}.up"][start:stop], pad])
            wanted[f"layer{layer}.gate_up"] = fused.flatten()
            wanted[f"layer{layer}.down"] = tensors[f"{layer}.down"][:, start:stop].flatten()
            wanted[f"layer{layer}.norm"] = tensors[f"{layer}.norm"].to(torch_dtype(self.dtype))
        return wanted


def mismatches(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of buffers that do not hold the wanted bits."""
    assert set(found) == set(wanted)
    return [n for n in wanted if not torch.equal(found[n].view(torch.uint8), wanted[n].contiguous().view(torch.uint8))]


def _share(length: int, rank: int, size: int) -> tuple[int, int]:
    """Start and stop of one rank's part; the last ranks get less where it does not divide."""
    each = -(-length // size)
    return min(rank * each, length), min((rank + 1) * each, length)
