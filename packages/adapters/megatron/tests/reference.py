"""Megatron's sharding once more, with whole tensors and torch indexing only: the oracle of the layouts.

Written from Megatron's own words (the comments of `get_query_key_value_tensors`, `_initialize_affine_weight_cpu`), and
sharing no code with weft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

State = dict[str, torch.Tensor]


def logical_state(config: Mapping[str, Any], seed: int = 0) -> State:
    """A random checkpoint: every element of every tensor differs from all others."""
    hidden, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (query, hidden),
            at + "self_attn.k_proj.weight": (key, hidden),
            at + "self_attn.v_proj.weight": (key, hidden),
            at + "self_attn.o_proj.weight": (hidden, query),
            at + "mlp.gate_proj.weight": (wide, hidden),
            at + "mlp.up_proj.weight": (wide, hidden),
            at + "mlp.down_proj.weight": (hidden, wide),
        }
        if config["model_type"] == "qwen2" or config.get("attention_bias"):
            shapes |= {at + f"self_attn.{part}_proj.bias": (query if part == "q" else key,) for part in "qkv"}
        if config.get("attention_bias"):
            shapes |= {at + "self_attn.o_proj.bias": (hidden,), at + "mlp.down_proj.bias": (hidden,)}
            shapes |= {at + "mlp.gate_proj.bias": (wide,), at + "mlp.up_proj.bias": (wide,)}
        if config["model_type"] == "qwen3":
            shapes |= {at + f"self_attn.{part}_norm.weight": (config["head_dim"],) for part in "qk"}
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    values = torch.randperm(total, generator=torch.Generator().manual_seed(seed)) + 1
    parts = values.to(torch.int32).view(torch.float32).split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def megatron_shard(
    config: Mapping[str, Any], state: State, tp_rank: int, tp: int, pp_rank: int, pp: int, padded: int
) -> State:
    """What Megatron holds on one rank, by its names with global layer numbers; padding rows are zero."""
    hidden, groups, head = config["hidden_size"], config["num_key_value_heads"], config["head_dim"]

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(tp)[tp_rank]

    def vocabulary(tensor: torch.Tensor) -> torch.Tensor:
        return rows(torch.cat([tensor, torch.zeros(padded - len(tensor), hidden)]))

    def qkv(at: str, kind: str) -> torch.Tensor:
        query, key, value = (state[f"{at}self_attn.{part}_proj.{kind}"] for part in "qkv")
        per_group = len(query) // groups
        grouped = []
        for group in range(groups):
            grouped.append(query[group * per_group : (group + 1) * per_group])
            grouped.append(key[group * head : (group + 1) * head])
            grouped.append(value[group * head : (group + 1) * head])
        return rows(torch.cat(grouped))

    def gated(at: str, kind: str) -> torch.Tensor:
        return torch.cat([rows(state[f"{at}mlp.gate_proj.{kind}"]), rows(state[f"{at}mlp.up_proj.{kind}"])])

    held: State = {}
    block = config["num_hidden_layers"] // pp
    if pp_rank == 0:
        held["embedding.word_embeddings.weight"] = vocabulary(state["model.embed_tokens.weight"])
    for layer in range(pp_rank * block, (pp_rank + 1) * block):
        at, local = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        held[local + "input_layernorm.weight"] = state[at + "input_layernorm.weight"]
        held[local + "pre_mlp_layernorm.weight"] = state[at + "post_attention_layernorm.weight"]
        held[local + "self_attention.linear_qkv.weight"] = qkv(at, "weight")
        held[local + "self_attention.linear_proj.weight"] = state[at + "self_attn.o_proj.weight"].chunk(tp, 1)[tp_rank]
        held[local + "mlp.linear_fc1.weight"] = gated(at, "weight")
        held[local + "mlp.linear_fc2.weight"] = state[at + "mlp.down_proj.weight"].chunk(tp, 1)[tp_rank]
        if at + "self_attn.q_proj.bias" in state:
            held[local + "self_attention.linear_qkv.bias"] = qkv(at, "bias")
        if at + "mlp.down_proj.bias" in state:
            held[local + "self_attention.linear_proj.bias"] = state[at + "self_attn.o_proj.bias"]
            held[local + "mlp.linear_fc1.bias"] = gated(at, "bias")
            held[local + "mlp.linear_fc2.bias"] = state[at + "mlp.down_proj.bias"]
        if at + "self_attn.q_norm.weight" in state:
            held[local + "self_attention.q_layernorm.weight"] = state[at + "self_attn.q_norm.weight"]
            held[local + "self_attention.k_layernorm.weight"] = state[at + "self_attn.k_norm.weight"]
    if pp_rank == pp - 1:
        held["decoder.final_layernorm.weight"] = state["model.norm.weight"]
        if not config["tie_word_embeddings"]:
            held["output_layer.weight"] = vocabulary(state["lm_head.weight"])
        elif pp > 1:
            held["output_layer.weight"] = vocabulary(state["model.embed_tokens.weight"])
    return held
