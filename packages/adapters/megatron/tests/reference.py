"""Megatron's sharding once more, with whole tensors and torch indexing only: the oracle of the layouts.

Written from Megatron's own words (the comments of `get_query_key_value_tensors`, `_initialize_affine_weight_cpu`,
`SequentialMLP`), and sharing no code with weft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where a rank stands: (rank, size) in each of its groups."""

    tp: tuple[int, int] = (0, 1)
    pp: tuple[int, int] = (0, 1)
    ep: tuple[int, int] = (0, 1)
    etp: tuple[int, int] = (0, 1)


def places(sizes: Mapping[str, int]) -> list[Place]:
    """Every rank's, in Megatron's default order: tp varies fastest, then dp, then pp; for experts etp, then ep."""
    tp, pp, dp, ep = (sizes.get(axis, 1) for axis in ("tp", "pp", "dp", "ep"))
    etp, stage = sizes.get("etp", tp), tp * dp
    return [
        Place((rank % tp, tp), (rank // stage, pp), (rank % stage // etp % ep, ep), (rank % etp, etp))
        for rank in range(stage * pp)
    ]


def sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has experts."""
    if config["model_type"] != "qwen3_moe" or layer in config.get("mlp_only_layers", []):
        return False
    return bool((layer + 1) % config.get("decoder_sparse_step", 1) == 0)


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
        }
        mlps = {at + "mlp.": wide}
        if sparse(config, layer):
            count = config["num_experts"]
            mlps = {f"{at}mlp.experts.{expert}.": config["moe_intermediate_size"] for expert in range(count)}
            shapes[at + "mlp.gate.weight"] = (count, hidden)
            if config.get("mlp_bias"):
                shapes[at + "mlp.gate.bias"] = (count,)
        for mlp, width in mlps.items():
            shapes |= {f"{mlp}{half}_proj.weight": (width, hidden) for half in ("gate", "up")}
            shapes |= {mlp + "down_proj.weight": (hidden, width)}
            if config.get("mlp_bias"):
                shapes |= {mlp + "gate_proj.bias": (width,), mlp + "up_proj.bias": (width,)}
                shapes |= {mlp + "down_proj.bias": (hidden,)}
        if config["model_type"] == "qwen2" or config.get("attention_bias"):
            shapes |= {at + f"self_attn.{part}_proj.bias": (query if part == "q" else key,) for part in "qkv"}
        if config.get("attention_bias"):
            shapes |= {at + "self_attn.o_proj.bias": (hidden,)}
        if config["model_type"] in ("qwen3", "qwen3_moe"):
            shapes |= {at + f"self_attn.{part}_norm.weight": (config["head_dim"],) for part in "qk"}
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    values = torch.randperm(total, generator=torch.Generator().manual_seed(seed)) + 1
    parts = values.to(torch.int32).view(torch.float32).split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def megatron_shard(config: Mapping[str, Any], state: State, place: Place, padded: int) -> State:
    """What Megatron holds on one rank, by its names with global layer and expert numbers; padding rows are zero."""
    hidden, groups, head = config["hidden_size"], config["num_key_value_heads"], config["head_dim"]
    tp_rank, tp = place.tp
    pp_rank, pp = place.pp

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

    def mlp(at: str, local: str, rank: int, ranks: int) -> State:
        def gated(kind: str) -> torch.Tensor:
            return torch.cat([state[f"{at}{half}_proj.{kind}"].chunk(ranks)[rank] for half in ("gate", "up")])

        found = {local + "linear_fc1.weight": gated("weight")}
        found[local + "linear_fc2.weight"] = state[at + "down_proj.weight"].chunk(ranks, 1)[rank]
        if at + "down_proj.bias" in state:
            found |= {local + "linear_fc1.bias": gated("bias"), local + "linear_fc2.bias": state[at + "down_proj.bias"]}
        return found

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
        if sparse(config, layer):
            held[local + "mlp.router.weight"] = state[at + "mlp.gate.weight"]
            if at + "mlp.gate.bias" in state:
                held[local + "mlp.router.bias"] = state[at + "mlp.gate.bias"]
            for expert in torch.arange(config["num_experts"]).chunk(place.ep[1])[place.ep[0]].tolist():
                name = f"{local}mlp.experts.local_experts.{expert}."
                held |= mlp(f"{at}mlp.experts.{expert}.", name, *place.etp)
        else:
            held |= mlp(at + "mlp.", local + "mlp.", tp_rank, tp)
        if at + "self_attn.q_proj.bias" in state:
            held[local + "self_attention.linear_qkv.bias"] = qkv(at, "bias")
        if at + "self_attn.o_proj.bias" in state:
            held[local + "self_attention.linear_proj.bias"] = state[at + "self_attn.o_proj.bias"]
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


def engine_names(config: Mapping[str, Any], held: State, *, grouped: bool) -> State:
    """The same under the names of Transformer Engine's layers."""
    renamed = {}
    for name, tensor in held.items():
        parts = name.split(".")
        if parts[-2] == "input_layernorm":
            parts[-2:] = ["self_attention", "linear_qkv", "layer_norm_weight"]
        elif parts[-2] == "pre_mlp_layernorm" and not sparse(config, int(parts[2])):
            parts[-2:] = ["mlp", "linear_fc1", "layer_norm_weight"]
        elif grouped and "local_experts" in parts:
            _, expert, linear, kind = parts[5:]
            parts[5:] = [linear, kind + expert]
        renamed[".".join(parts)] = tensor
    return renamed
