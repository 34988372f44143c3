"""A recorded layout against what the model's own loader does with real tensors, and weft does not see."""

from __future__ import annotations

from typing import Any

import torch

from weft.layout import ITEM_BYTES, Layout
from weft_vllm.binding import RecordedLayout
from weft_vllm.parameters import LOADER


@torch.no_grad()
def loaded_otherwise(model: Any, recorded: RecordedLayout, checkpoint: dict[str, torch.Tensor]) -> list[str]:
    """Parameters of a model, as it is after loading and before processing, in which `checkpoint`, laid out by hand as
    `recorded` says, is not bit for bit what `load_weights` makes of it.
    """
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    model.load_weights(iter(checkpoint.items()))
    held = executed(recorded.layout, checkpoint)
    by_loader = {name.removeprefix(LOADER): held.pop(name) for name in [*held] if name.startswith(LOADER)}
    wrong = [name for name, memory in held.items() if not same_bits(memory, recorded.slots[name].live)]
    whole = {name: memory.view(checkpoint[name].shape) for name, memory in by_loader.items()}
    loaded = {name: recorded.slots[name].live.clone() for name in recorded.derived}
    for name in loaded:
        recorded.slots[name].live.fill_(float("nan"))
    model.load_weights(iter(whole.items()))
    return wrong + [name for name, tensor in loaded.items() if not same_bits(tensor, recorded.slots[name].live)]


def executed(layout: Layout, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Poisoned buffers with every piece and fill written."""
    memory = {
        buffer.name: torch.full((buffer.numel * ITEM_BYTES[buffer.dtype],), 0xFF, dtype=torch.uint8).view(
            getattr(torch, buffer.dtype)
        )
        for buffer in layout.buffers
    }
    for piece in layout:
        ranges = tuple(slice(low, high) for low, high in zip(piece.box.lo, piece.box.hi, strict=True))
        part = values[piece.tensor].reshape(piece.box.factors)[ranges]
        memory[piece.buffer].as_strided(part.shape, piece.strides, piece.offset).copy_(part)
    for fill in layout.fills:
        memory[fill.buffer].as_strided(fill.sizes, fill.strides, fill.offset).fill_(fill.value)
    return memory


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two dense tensors hold the same bytes in the same order of memory."""
    flat = [tensor.data.as_strided((tensor.numel(),), (1,)) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))
