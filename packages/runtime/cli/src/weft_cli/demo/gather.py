"""The trainer's weights as a Hugging Face state dict, by plain torch and nothing of weft: one half of the demo's
reference.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def gather_state(
    model: nn.Module, *, vocabulary: int, layers: int, heads: int, key_value_heads: int, head_dim: int
) -> dict[str, torch.Tensor]:
    """The whole model under Hugging Face's Qwen3 names, on every rank. Collective: the default group is the
    tensor-parallel group.
    """
    shards = {name: _of_all_ranks(parameter.detach()) for name, parameter in model.named_parameters()}
    per_group = heads // key_value_heads

    state = {
        "model.embed_tokens.weight": torch.cat(shards["embedding.word_embeddings.weight"])[:vocabulary],
        "model.norm.weight": _same(shards["decoder.final_layernorm.weight"]),
        "lm_head.weight": torch.cat(shards["output_layer.weight"])[:vocabulary],
    }
    for layer in range(layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, feed_forward = f"{theirs}.self_attn", f"{theirs}.mlp"
        # One entry per key-value head along the second axis: its query heads, one key, one value.
        fused = torch.cat(shards[f"{ours}.self_attention.linear_qkv.weight"]).view(
            key_value_heads, per_group + 2, head_dim, -1
        )
        gates, ups = zip(*(shard.chunk(2) for shard in shards[f"{ours}.mlp.linear_fc1.weight"]), strict=True)
        state |= {
            f"{theirs}.input_layernorm.weight": _same(shards[f"{ours}.input_layernorm.weight"]),
            f"{attention}.q_proj.weight": fused[:, :per_group].reshape(heads * head_dim, -1),
            f"{attention}.k_proj.weight": fused[:, per_group].reshape(key_value_heads * head_dim, -1),
            f"{attention}.v_proj.weight": fused[:, per_group + 1].reshape(key_value_heads * head_dim, -1),
            f"{attention}.q_norm.weight": _same(shards[f"{ours}.self_attention.q_layernorm.weight"]),
            f"{attention}.k_norm.weight": _same(shards[f"{ours}.self_attention.k_layernorm.weight"]),
            f"{attention}.o_proj.weight": torch.cat(shards[f"{ours}.self_attention.linear_proj.weight"], dim=1),
            f"{theirs}.post_attention_layernorm.weight": _same(shards[f"{ours}.pre_mlp_layernorm.weight"]),
            f"{feed_forward}.gate_proj.weight": torch.cat(gates),
            f"{feed_forward}.up_proj.weight": torch.cat(ups),
            f"{feed_forward}.down_proj.weight": torch.cat(shards[f"{ours}.mlp.linear_fc2.weight"], dim=1),
        }
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def _of_all_ranks(local: torch.Tensor) -> list[torch.Tensor]:
    shards = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, local.contiguous())
    return shards


def _same(shards: list[torch.Tensor]) -> torch.Tensor:
    """A parameter that every rank holds whole. Raises `ValueError` when the ranks have drifted apart."""
    if any(not torch.equal(shards[0], shard) for shard in shards[1:]):
        raise ValueError("tensor-parallel ranks hold different values of one replicated parameter")
    return shards[0]
