"""Tiny configs, and layouts executed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from weft.layout import Layout

HIDDEN, HEAD, INNER, VOCABULARY = 8, 4, 24, 67
EXPERTS, EXPERT_INNER = 5, 16
LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3,
    "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "topk_method": "noaux_tc",
}  # fmt: skip


def config(family: str, heads: int = 8, kv_heads: int = 2, tied: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "model_type": family, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": HEAD, "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied, "num_experts": EXPERTS, "moe_intermediate_size": EXPERT_INNER, **more,
    }  # fmt: skip


def numbered(layout: Layout) -> dict[str, np.ndarray[Any, Any]]:
    """A different value for every element of every logical tensor."""
    values, first = {}, 1
    for tensor in sorted(layout.tensors, key=lambda t: t.name):
        values[tensor.name] = np.arange(first, first + tensor.numel).reshape(tensor.shape)
        first += tensor.numel
    return values


def executed(layout: Layout, values: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Poisoned buffers, with every piece and fill written, and nothing twice."""
    memory = {buffer.name: np.full(buffer.numel, -1) for buffer in layout.buffers}

    def write(buffer: str, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], what: Any) -> None:
        flat = memory[buffer]
        view = np.lib.stride_tricks.as_strided(flat[offset:], sizes, [8 * stride for stride in strides])
        assert (view == -1).all(), f"{buffer}: written twice"
        view[...] = what

    for piece in layout:
        ranges = tuple(slice(low, high) for low, high in zip(piece.box.lo, piece.box.hi, strict=True))
        part = values[piece.tensor].reshape(piece.box.factors)[ranges]
        write(piece.buffer, piece.offset, part.shape, piece.strides, part)
    for fill in layout.fills:
        write(fill.buffer, fill.offset, fill.sizes, fill.strides, fill.value)
    return memory
