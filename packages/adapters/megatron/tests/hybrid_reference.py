"""The oracle of `reference.py` for Nemotron-H: whole tensors and torch indexing, sharing no code with weft.

Written from Megatron's own words: `MambaMixer.__init__` and `forward` (z, x, B, C, dt), `MambaStack`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .reference import Place, Sharding, State

KINDS = {"linear_attention": "mixer.in_proj", "full_attention": "self_attention.linear_qkv", "mlp": "mlp.linear_fc1"}
"""First linear layer of a kind of layer."""
NORMS = {"linear_attention": "norm", "full_attention": "input_layernorm"}


def hybrid_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint."""
    hidden, vocabulary, head = config["hidden_size"], config["vocab_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    heads, wide = config["mamba_num_heads"], config["intermediate_size"]
    inner, shared = heads * config["mamba_head_dim"], config["n_groups"] * config["ssm_state_size"]
    channels = inner + 2 * shared
    mixers: dict[str, dict[str, tuple[int, ...]]] = {
        "linear_attention": {
            "in_proj.weight": (inner + channels + heads, hidden),
            "conv1d.weight": (channels, 1, config["conv_kernel"]),
            "conv1d.bias": (channels,),
            "dt_bias": (heads,),
            "A_log": (heads,),
            "D": (heads,),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        },
        "full_attention": {
            "q_proj.weight": (query, hidden),
            "k_proj.weight": (key, hidden),
            "v_proj.weight": (key, hidden),
            "o_proj.weight": (hidden, query),
        },
        "mlp": {"up_proj.weight": (wide, hidden), "down_proj.weight": (hidden, wide)},
    }
    if "moe" in config["layers_block_type"]:
        count, wide, shared = (
            config[name]
            for name in ("n_routed_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size")
        )
        mixers["moe"] = {"gate.weight": (count, hidden), "gate.e_score_correction_bias": (count,)}
        for at, width in {"shared_experts": shared, **{f"experts.{n}": wide for n in range(count)}}.items():
            mixers["moe"] |= {f"{at}.up_proj.weight": (width, hidden), f"{at}.down_proj.weight": (hidden, width)}
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.weight": (vocabulary, hidden),
        "backbone.norm_f.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer, kind in enumerate(config["layers_block_type"]):
        at = f"backbone.layers.{layer}."
        shapes[at + "norm.weight"] = (hidden,)
        shapes |= {f"{at}mixer.{name}": shape for name, shape in mixers[kind].items()}
    return shapes


def hybrid_shard(
    config: Mapping[str, Any], state: State, place: Place, padded: int, *, engine: bool, grouped: bool
) -> State:
    """What Megatron holds on one rank; `engine` is Transformer Engine's specification, `grouped` with its experts."""
    shard = Sharding(config, state, place, padded)
    stage, stages = place.pp
    held: State = {}
    if stage == 0:
        held["embedding.word_embeddings.weight"] = shard.vocabulary(state["backbone.embeddings.weight"])
    for layer in torch.arange(len(config["layers_block_type"])).chunk(stages)[stage].tolist():
        kind, at, local = config["layers_block_type"][layer], f"backbone.layers.{layer}.", f"decoder.layers.{layer}."
        norm = f"{NORMS.get(kind, 'pre_mlp_layernorm')}.weight"
        if engine and kind in KINDS:
            norm = f"{KINDS[kind]}.layer_norm_weight"
        held[local + norm] = state[at + "norm.weight"]
        own = {name.removeprefix(at + "mixer."): tensor for name, tensor in state.items() if name.startswith(at)}
        if kind == "linear_attention":
            mixer = _mamba(shard, own)
        elif kind == "full_attention":
            mixer = {
                "self_attention.linear_qkv.weight": shard.qkv(at + "mixer.", "weight"),
                "self_attention.linear_proj.weight": shard.columns(own["o_proj.weight"]),
            }
        elif kind == "moe":
            mixer = _experts(shard, own, grouped=grouped)
        else:
            mixer = {
                "mlp.linear_fc1.weight": shard.rows(own["up_proj.weight"]),
                "mlp.linear_fc2.weight": shard.columns(own["down_proj.weight"]),
            }
        held |= {local + name: tensor for name, tensor in mixer.items()}
    if stage == stages - 1:
        held["decoder.final_norm.weight"] = state["backbone.norm_f.weight"]
        held["output_layer.weight"] = shard.vocabulary(state["lm_head.weight"])
    return held


def _mamba(shard: Sharding, own: State) -> State:
    config = shard.config
    heads = config["mamba_num_heads"]
    inner, shared = heads * config["mamba_head_dim"], config["n_groups"] * config["ssm_state_size"]

    def components(name: str, sizes: Sequence[int]) -> torch.Tensor:
        return torch.cat([shard.rows(component) for component in own[name].split(list(sizes))])

    return {
        "mixer.in_proj.weight": components("in_proj.weight", [inner, inner, shared, shared, heads]),
        "mixer.conv1d.weight": components("conv1d.weight", [inner, shared, shared]),
        "mixer.conv1d.bias": components("conv1d.bias", [inner, shared, shared]),
        **{f"mixer.{name}": shard.rows(own[name]) for name in ("dt_bias", "A_log", "D", "norm.weight")},
        "mixer.out_proj.weight": shard.columns(own["out_proj.weight"]),
    }


def _experts(shard: Sharding, own: State, *, grouped: bool) -> State:
    (rank, ranks), (part, parts) = shard.place.ep, shard.place.etp
    held = {
        "mlp.router.weight": own["gate.weight"],
        "mlp.router.expert_bias": own["gate.e_score_correction_bias"],
        "mlp.shared_experts.linear_fc1.weight": shard.rows(own["shared_experts.up_proj.weight"]),
        "mlp.shared_experts.linear_fc2.weight": shard.columns(own["shared_experts.down_proj.weight"]),
    }
    for expert in torch.arange(shard.config["n_routed_experts"]).chunk(ranks)[rank].tolist():
        up, down = (own[f"experts.{expert}.{name}_proj.weight"] for name in ("up", "down"))
        for linear, weight in (("fc1", up.chunk(parts)[part]), ("fc2", down.chunk(parts, 1)[part])):
            local = f"linear_{linear}.weight{expert}" if grouped else f"local_experts.{expert}.linear_{linear}.weight"
            held[f"mlp.experts.{local}"] = weight
    return held
