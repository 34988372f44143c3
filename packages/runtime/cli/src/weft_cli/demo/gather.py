"""The trainer's weights as a Hugging Face state dict, by plain torch and nothing of weft: one half of the demo's
reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn


def gather_state(model: nn.Module, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The whole model, of one pipeline stage, under Hugging Face's Qwen3 or Qwen3-MoE names, on every rank; `config` is
    Hugging Face's. Experts are whole on one rank each, or on several that hold the same. Collective over all ranks.
    """
    tensor, replicas = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
    local = {name: parameter.detach() for name, parameter in model.named_parameters()}
    experts = {name: value for name, value in local.items() if ".local_experts." in name}
    shards = {
        name: _of_all_ranks(_same(_of_all_ranks(value, replicas)), tensor)
        for name, value in local.items()
        if name not in experts
    }
    vocabulary, layers = config["vocab_size"], config["num_hidden_layers"]
    heads, key_value_heads, head_dim = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
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
        state |= {
            f"{theirs}.input_layernorm.weight": _same(shards[f"{ours}.input_layernorm.weight"]),
            f"{attention}.q_proj.weight": fused[:, :per_group].reshape(heads * head_dim, -1),
            f"{attention}.k_proj.weight": fused[:, per_group].reshape(key_value_heads * head_dim, -1),
            f"{attention}.v_proj.weight": fused[:, per_group + 1].reshape(key_value_heads * head_dim, -1),
            f"{attention}.q_norm.weight": _same(shards[f"{ours}.self_attention.q_layernorm.weight"]),
            f"{attention}.k_norm.weight": _same(shards[f"{ours}.self_attention.k_layernorm.weight"]),
            f"{attention}.o_proj.weight": torch.cat(shards[f"{ours}.self_attention.linear_proj.weight"], dim=1),
            f"{theirs}.post_attention_layernorm.weight": _same(shards[f"{ours}.pre_mlp_layernorm.weight"]),
        }
        if f"{ours}.mlp.router.weight" in shards:
            state[f"{feed_forward}.gate.weight"] = _same(shards[f"{ours}.mlp.router.weight"])
        else:
            gates, ups = zip(*(shard.chunk(2) for shard in shards[f"{ours}.mlp.linear_fc1.weight"]), strict=True)
            state |= {
                f"{feed_forward}.gate_proj.weight": torch.cat(gates),
                f"{feed_forward}.up_proj.weight": torch.cat(ups),
                f"{feed_forward}.down_proj.weight": torch.cat(shards[f"{ours}.mlp.linear_fc2.weight"], dim=1),
            }
    state |= _gather_experts(experts)
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def _gather_experts(local: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of all ranks: each rank has equally many of every layer, in the order of the ranks."""
    state = {}
    count = len({name.split(".local_experts.")[1].split(".")[0] for name in local})
    for name, value in local.items():
        layer, rest = name.removeprefix("decoder.layers.").split(".mlp.experts.local_experts.")
        number, linear = rest.split(".")[:2]
        for rank, whole in enumerate(_of_all_ranks(value, parallel_state.get_expert_model_parallel_group())):
            theirs = f"model.layers.{layer}.mlp.experts.{rank * count + int(number)}"
            if linear == "linear_fc1":
                state[f"{theirs}.gate_proj.weight"], state[f"{theirs}.up_proj.weight"] = whole.chunk(2)
            else:
                state[f"{theirs}.down_proj.weight"] = whole
    return state


def _of_all_ranks(local: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards


def _same(shards: list[torch.Tensor]) -> torch.Tensor:
    """A parameter that every rank holds whole. Raises `ValueError` when the ranks have drifted apart."""
    if any(not torch.equal(shards[0], shard) for shard in shards[1:]):
        raise ValueError("ranks hold different values of one replicated parameter")
    return shards[0]
