"""Megatron-Core models of the families that the demo does not build, from Hugging Face configs, on CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm import gated_delta_net
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.experimental_attention_variant import dsa
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from support.megatron_hybrid import build_hybrid, hybrid_config

from weft_cli.demo import megatron_on_cpu

Config = Mapping[str, Any]


def build_model(
    config: Config,
    *,
    padded_vocabulary: int,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
    **options: Any,
) -> GPTModel | MambaModel:
    """This rank's part of a model of any family, or one of its virtual pipeline chunks; see the demo's `build_model`.

    `options` are more fields of `TransformerConfig`. Collective: `parallel_state` is set up already.
    """
    if config["model_type"] == "nemotron_h":
        return build_hybrid(config, padded_vocabulary=padded_vocabulary, dtype=dtype)
    transformer = transformer_config(config, dtype, **options)
    pp = parallel_state.get_pipeline_model_parallel_rank()
    last = parallel_state.get_pipeline_model_parallel_world_size() - 1
    chunks = transformer.virtual_pipeline_model_parallel_size or 1
    layers = get_gpt_decoder_block_spec(
        transformer, use_transformer_engine=False, normalization="RMSNorm", vp_stage=chunk, pp_rank=pp
    )
    if transformer.multi_latent_attention:
        # None without Transformer Engine, and asked for as a class.
        multi_latent_attention.TELinear = type("TELinear", (), {})
        sparse = transformer.experimental_attention_variant == "dsa"
        for layer in layers.layer_specs:
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = sparse_attention() if sparse else LatentCoreAttention
    if transformer.experimental_attention_variant == "gated_delta_net":
        use_gated_delta(layers, transformer, chunk, pp)
    predictors = None
    if transformer.mtp_num_layers:
        predictors = get_gpt_mtp_block_spec(
            transformer, layers, use_transformer_engine=False, vp_stage=chunk, pp_rank=pp
        )
    return GPTModel(
        transformer,
        layers,
        vocab_size=padded_vocabulary,
        max_sequence_length=config["max_position_embeddings"],
        pre_process=pp == 0 and chunk in (None, 0),
        post_process=pp == last and chunk in (None, chunks - 1),
        parallel_output=False,
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_percent=config["rope_parameters"].get("partial_rotary_factor", 1.0),
        rotary_base=megatron_on_cpu.rope_theta(config),
        vp_stage=chunk,
        mtp_block_spec=predictors,
    )


class LatentCoreAttention(torch.nn.Module):
    """What Transformer Engine computes on CUDA; Megatron's own cannot be built for multi-latent attention in 0.16.1."""

    def __init__(self, config: TransformerConfig, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """All of shape (length, batch, heads, elements), causal; returns (length, batch, heads x elements)."""
        heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=self.scale)
        return found.permute(2, 0, 1, 3).flatten(2)


class WholeLinear(torch.nn.Linear):
    """What Transformer Engine's linear layer is to Megatron's modules when every rank has all of it."""

    def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(input), None


def sparse_attention() -> ModuleSpec:
    """As `get_dsa_module_spec_for_backend`, which needs Transformer Engine.

    Queries and keys are rotated by a Hadamard matrix there, in bfloat16 on CUDA, which changes no product of the two.
    """
    dsa.rotate_activation = lambda activation: activation
    indexer = dsa.DSAIndexerSubmodules(
        linear_wq_b=WholeLinear, linear_wk=WholeLinear, k_norm=WrappedTorchNorm, linear_weights_proj=WholeLinear
    )
    submodules = dsa.DSAttentionSubmodules(indexer=ModuleSpec(module=dsa.DSAIndexer, submodules=indexer))
    return ModuleSpec(module=dsa.DSAttention, submodules=submodules)


class PlainNorm(torch.nn.RMSNorm):
    """Megatron's own norm for CPU refuses a configuration with zero-centered weights."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps, dtype=torch.float32)


class ZeroCenteredNorm(PlainNorm):
    """Multiplies by one more than its weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(input, self.normalized_shape, 1 + self.weight, self.eps)


def use_gated_delta(layers: Any, transformer: TransformerConfig, chunk: int | None, stage: int) -> None:
    """As `get_transformer_block_with_experimental_attention_variant_spec`, which needs Transformer Engine.

    The delta rule of its deterministic mode is in torch; the package fla, which it asks for all the same, would
    normalize.
    """
    gated_delta_net.HAVE_FLA = True
    gated_delta_net.l2norm = lambda tensor: tensor * (tensor.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    linear = gated_delta_net.GatedDeltaNetSubmodules(ColumnParallelLinear, PlainNorm, RowParallelLinear)
    pattern = get_linear_attention_pattern(transformer)
    first = get_transformer_layer_offset(transformer, vp_stage=chunk, pp_rank=stage)
    layers.layer_norm = ZeroCenteredNorm
    # Layers of one kind share a specification.
    layers.layer_specs = [deepcopy(layer) for layer in layers.layer_specs]
    for number, layer in enumerate(layers.layer_specs, first):
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = ZeroCenteredNorm
        if pattern[number]:
            parts.self_attention = ModuleSpec(module=gated_delta_net.GatedDeltaNet, submodules=linear)
        else:
            norms = parts.self_attention.submodules
            norms.q_layernorm = norms.k_layernorm = ZeroCenteredNorm


def transformer_config(config: Config, dtype: torch.dtype = torch.float32, **options: Any) -> TransformerConfig:
    """Megatron's configuration of a model of any family, for the groups that exist in this process."""
    if config["model_type"] == "nemotron_h":
        return hybrid_config(config, dtype)
    kind, family = FAMILIES.get(config["model_type"], (TransformerConfig, lambda config: {}))
    return megatron_on_cpu.transformer_config(config, dtype, kind, **(family(config) | options))


def _deepseek(config: Config) -> dict[str, Any]:
    latent = {
        "qk_layernorm": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rope_type": "rope",
        "rotary_base": megatron_on_cpu.rope_theta(config),
        "apply_rope_fusion": False,
    }
    return latent | _sigmoid_experts(config)


def _sigmoid_experts(config: Config) -> dict[str, Any]:
    first, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    grouped = config["n_group"] > 1
    return {
        "num_moe_experts": config["n_routed_experts"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "moe_layer_freq": [int(layer >= first) for layer in range(layers)],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_router_num_groups": config["n_group"] if grouped else None,
        "moe_router_group_topk": config["topk_group"] if grouped else None,
        **megatron_on_cpu.experts_on_cpu(),
    }


def _mixtral(config: Config) -> dict[str, Any]:
    return {
        "num_moe_experts": config["num_local_experts"],
        "moe_ffn_hidden_size": config["intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        **megatron_on_cpu.experts_on_cpu(),
    }


def _glm4_moe(config: Config) -> dict[str, Any]:
    attention = {"add_qkv_bias": config["attention_bias"], "qk_layernorm": config["use_qk_norm"]}
    return attention | _sigmoid_experts(config)


def _qwen3_next(config: Config) -> dict[str, Any]:
    linear = [int(kind == "linear_attention") for kind in config["layer_types"]]
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    sparse = megatron_on_cpu.sparse_layers(config)
    return {
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "attention_output_gate": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": linear,
        **{f"linear_{name}": config[f"linear_{name}"] for name in names},
        "deterministic_mode": True,
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
        "num_moe_experts": config["num_experts"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_layer_freq": [int(layer in sparse) for layer in range(config["num_hidden_layers"])],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_pre_softmax": not config["norm_topk_prob"],
        **megatron_on_cpu.experts_on_cpu(),
    }


def _gpt_oss(config: Config) -> dict[str, Any]:
    """As Megatron Bridge sets it up: `bridge/models/gpt_oss/gpt_oss_bridge.py`."""
    gate = {
        "activation_func": quick_gelu,
        "activation_func_clamp_value": 7.0,
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "add_bias_linear": True,
    }
    return gate | _mixtral(config)


def _glm_moe_dsa(config: Config) -> dict[str, Any]:
    indexer = {
        "experimental_attention_variant": "dsa",
        "dsa_indexer_n_heads": config["index_n_heads"],
        "dsa_indexer_head_dim": config["index_head_dim"],
        "dsa_indexer_topk": config["index_topk"],
    }
    return indexer | _deepseek(config)


FAMILIES: Mapping[str, tuple[type[TransformerConfig], Callable[[Config], dict[str, Any]]]] = {
    "deepseek_v3": (MLATransformerConfig, _deepseek),
    "kimi_k2": (MLATransformerConfig, _deepseek),
    "glm_moe_dsa": (MLATransformerConfig, _glm_moe_dsa),
    "mixtral": (TransformerConfig, _mixtral),
    "glm4_moe": (TransformerConfig, _glm4_moe),
    "qwen3_next": (TransformerConfig, _qwen3_next),
    "gpt_oss": (TransformerConfig, _gpt_oss),
}
"""Kind of configuration and its fields, by `model_type`; others are the demo's own."""
