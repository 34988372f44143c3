"""Megatron models, or configs of them, that are wrong in some way, by what is wrong; and renamed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Config = dict[str, Any]


def _spoil_parameters(model: Any, config: Config) -> tuple[Any, Config]:
    first, second = model.decoder.layers[0], model.decoder.layers[1]
    first.mlp.linear_fc2.weight = torch.nn.Parameter(torch.zeros(3, 5))
    first.input_layernorm.extra = torch.nn.Parameter(torch.zeros(2))
    del first.pre_mlp_layernorm.weight
    second.self_attention.linear_proj.weight.data = second.self_attention.linear_proj.weight.data.half()
    second.mlp.linear_fc1.weight.data = second.mlp.linear_fc1.weight.data.t().contiguous().t()
    second.register_buffer("expert_bias", torch.zeros(4))
    return model, config


def _add_cache(model: Any, config: Config) -> tuple[Any, Config]:
    model.decoder.layers[1].register_buffer("cache", torch.zeros(4), persistent=False)
    return model, config


SPOIL: Mapping[str, Callable[[Any, Config], tuple[Any, Config]]] = {
    "parameters": _spoil_parameters,
    "transient buffer": _add_cache,
    "other heads": lambda model, config: (
        model,
        config | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": config["head_dim"] // 2},
    ),
    "untied config": lambda model, config: (model, config | {"tie_word_embeddings": False}),
    "other family": lambda model, config: (model, config | {"model_type": "llama"}),
    "mixture of experts": lambda model, config: (
        model,
        config | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "not a model": lambda model, config: (model.decoder, config),
    "no chunks": lambda model, config: ([], config),
    "a chunk twice": lambda model, config: ([model, model], config),
}


def rename_as_grouped(model: Any) -> None:
    """Give the parameters of a model with experts the names of Transformer Engine's grouped layers (`TEGroupedMLP`),
    which need a GPU. It does not run any more.
    """
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        layer.input_layernorm = torch.nn.Identity()
        if not hasattr(layer.mlp, "experts"):
            layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
            layer.pre_mlp_layernorm = torch.nn.Identity()
            continue
        grouped = torch.nn.ModuleDict({name: torch.nn.Module() for name in ("linear_fc1", "linear_fc2")})
        for number, expert in enumerate(layer.mlp.experts.local_experts):
            for name, linear in grouped.items():
                setattr(linear, f"weight{number}", getattr(expert, name).weight)
        layer.mlp.experts = grouped


def join_as_legacy(model: Any) -> None:
    """Put the experts of every layer in the two weights of `GroupedMLP`, which needs the package grouped_gemm."""
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "experts"):
            experts = [(each.linear_fc1.weight, each.linear_fc2.weight) for each in layer.mlp.experts.local_experts]
            first, second = (torch.stack([weight.T for weight in weights]) for weights in zip(*experts, strict=True))
            layer.mlp.experts = torch.nn.Module()
            layer.mlp.experts.weight1 = torch.nn.Parameter(first.reshape(first.shape[1], -1))
            layer.mlp.experts.weight2 = torch.nn.Parameter(second.reshape(-1, second.shape[2]))


def _number_anew(model: Any, config: Config) -> tuple[Any, Config]:
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.local_expert_indices = [(number + 2) % 4 for number in layer.mlp.local_expert_indices]
    return model, config


def _set(model: Any, config: Config, **values: Any) -> tuple[Any, Config]:
    for name, value in values.items():
        setattr(model.config, name, value)
    return model, config


def _add_expert_bias(model: Any, config: Config) -> tuple[Any, Config]:
    router = model.decoder.layers[0].mlp.router
    del router.expert_bias
    router.register_buffer("expert_bias", torch.zeros(4))
    return _set(model, config, moe_router_enable_expert_bias=True)


def _add_shared_experts(model: Any, config: Config) -> tuple[Any, Config]:
    model.decoder.layers[0].mlp.shared_experts = torch.nn.Module()
    model.decoder.layers[0].mlp.shared_experts.weight = torch.nn.Parameter(torch.zeros(2))
    return _set(model, config, moe_shared_expert_intermediate_size=16)


def _join_some(model: Any, config: Config) -> tuple[Any, Config]:
    join_as_legacy(model)
    model.decoder.layers[0].mlp.experts.weight1 = torch.nn.Parameter(torch.zeros(64, 32))
    return model, config


EXPERT_SPOIL: Mapping[str, Callable[[Any, Config], tuple[Any, Config]]] = {
    "other experts": lambda model, config: (
        model,
        config | {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 8},
    ),
    "other routing": lambda model, config: _set(
        model, config | {"norm_topk_prob": False}, moe_router_topk_scaling_factor=2.5
    ),
    "experts elsewhere": lambda model, config: (model, config | {"mlp_only_layers": [2, 3]}),
    "a dense config": lambda model, config: (model, config | {"model_type": "qwen3"}),
    "expert bias": _add_expert_bias,
    "shared experts": _add_shared_experts,
    "legacy grouped experts": _join_some,
    "other numbers": _number_anew,
}


def _center_norm(model: Any, config: Config) -> tuple[Any, Config]:
    """As Transformer Engine builds it."""
    model.decoder.layers[0].self_attention.out_norm.zero_centered_gamma = True
    return model, config


DELTA_SPOIL: Mapping[str, Callable[[Any, Config], tuple[Any, Config]]] = {
    "zero-centered norm": _center_norm,
    "other sizes": lambda model, config: (model, config | {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}),
    "no gates": lambda model, config: _set(model, config, attention_output_gate=False, moe_shared_expert_gate=False),
    "other layers": lambda model, config: (model, config | {"layer_types": ["linear_attention"] * 4}),
}
"""Of a model with the gated delta rule whose second layer has attention."""
