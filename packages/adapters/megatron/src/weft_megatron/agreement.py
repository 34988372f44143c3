"""Whether a live model's configuration says what the Hugging Face config says.

Field names and meanings are of Megatron-Core 0.16.1 (`core/transformer/transformer_config.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from weft_megatron.family import DecoderModel
from weft_megatron.upstream import ACTIVATION_OF_HYBRIDS, GATE_OF_GPT_OSS, Chunk


def config_faults(chunk: Chunk, model: DecoderModel) -> list[str]:
    """Where the model's own configuration contradicts the Hugging Face config."""
    config, hybrid = chunk.module.config, model.hybrid
    activation: object = ACTIVATION_OF_HYBRIDS if hybrid else torch.nn.functional.silu
    expected: dict[str, object] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "gated_linear_unit": hybrid is None,
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "normalization": "RMSNorm",
        # These change what stored values mean.
        "layernorm_zero_centered_gamma": model.zero_centered,
        "rotary_interleaved": False,
        "attention_output_gate": model.output_gate,
        "activation_func": GATE_OF_GPT_OSS if model.sinks else activation,
        "activation_func_clamp_value": 7.0 if model.sinks else None,
        "glu_linear_offset": 1.0 if model.sinks else 0.0,
        "softmax_type": "learnable" if model.sinks else "vanilla",
        **_expected_attention(model),
        **_expected_experts(model),
    }
    if model.dense_layers:
        expected["ffn_hidden_size"] = model.intermediate
    # add_bias_linear implies the qkv biases whatever add_qkv_bias says.
    ignored = {"add_qkv_bias"} if model.linear_bias else set()
    faults = [
        f"the model was built with {name}={getattr(config, name)!r}, {model.family} of this config needs {value!r}"
        for name, value in expected.items()
        if name not in ignored and getattr(config, name) != value
    ]
    if (
        model.experts
        and not hybrid
        and _sparse_layers(config) != {layer for layer in model.sparse_layers if layer < model.layers}
    ):
        faults.append(
            f"the model was built with moe_layer_freq={config.moe_layer_freq!r}, {model.family} of this config has "
            f"experts in the layers {sorted(model.sparse_layers)}"
        )
    if model.experts and model.experts.sigmoid and not model.experts.normalized:
        faults.append(
            "norm_topk_prob is false, and Megatron always divides the sigmoids of chosen experts by their sum"
        )
    if model.experts and config.moe_router_load_balancing_type == "sinkhorn":
        faults.append("moe_router_load_balancing_type='sinkhorn' routes in a way that no checkpoint can express")
    for name, layer in chunk.transformer_layers.items():
        if model.delta and getattr(getattr(layer.self_attention, "out_norm", None), "zero_centered_gamma", False):
            faults.append(
                f"{name}: the norm behind its delta rule is zero-centered and the checkpoint's is not, so that values "
                "differ by one; build it without"
            )
    if bool(chunk.module.share_embeddings_and_output_weights) != model.tied:
        faults.append(
            f"the model was built with share_embeddings_and_output_weights="
            f"{chunk.module.share_embeddings_and_output_weights}, the config says tie_word_embeddings={model.tied}"
        )
    return faults


def _expected_attention(model: DecoderModel) -> dict[str, object]:
    """What the configuration of a model with this attention, or with what takes its place, must say."""
    grouped: dict[str, object] = {
        "multi_latent_attention": False,
        "num_query_groups": model.groups,
        "kv_channels": model.head,
    }
    if hybrid := model.hybrid:
        # Shapes tell the number of Mamba's heads, which Megatron may derive.
        return {
            **grouped,
            "mamba_head_dim": hybrid.head,
            "mamba_num_groups": hybrid.groups,
            "mamba_state_dim": hybrid.state,
        }
    if delta := model.delta:
        return {
            **grouped,
            "experimental_attention_variant": "gated_delta_net",
            "linear_num_key_heads": delta.keys,
            "linear_num_value_heads": delta.values,
            "linear_key_head_dim": delta.key_head,
            "linear_value_head_dim": delta.value_head,
            "linear_conv_kernel_dim": delta.kernel,
        }
    if model.latent is None:
        return grouped
    indexer = model.latent.indexer
    sparse: dict[str, object] = {}
    if indexer:
        sparse = {"dsa_indexer_n_heads": indexer.heads, "dsa_indexer_head_dim": indexer.head}
    return {
        **sparse,
        "multi_latent_attention": True,
        "q_lora_rank": model.latent.query_rank,
        "kv_lora_rank": model.latent.key_rank,
        "qk_head_dim": model.latent.plain,
        "qk_pos_emb_head_dim": model.latent.rotary,
        "v_head_dim": model.latent.value,
    }


def _expected_experts(model: DecoderModel) -> dict[str, object]:
    """What the configuration of a model with these experts, or with none, must say."""
    experts = model.experts
    if experts is None:
        return {"num_moe_experts": None}
    groups, of_groups = experts.groups or (None, None)
    expected: dict[str, object] = {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.intermediate,
        "moe_router_topk": experts.chosen,
        "moe_router_score_function": "sigmoid" if experts.sigmoid else "softmax",
        "moe_router_topk_scaling_factor": experts.scale,
        "moe_router_num_groups": groups,
        "moe_router_group_topk": of_groups,
        "moe_shared_expert_intermediate_size": experts.shared or None,
        "moe_shared_expert_gate": experts.shared_gate,
        # No checkpoint of the family has a place for these, or they give stored values another meaning.
        "moe_router_enable_expert_bias": experts.corrected,
        "moe_apply_probs_on_input": False,
        "moe_latent_size": None,
    }
    if not experts.sigmoid:
        # Softmax over the chosen experts alone gives weights that add up to one; sigmoids are always divided so.
        expected["moe_router_pre_softmax"] = not experts.normalized
    return expected


def _sparse_layers(config: Any) -> frozenset[int]:
    """The layers with experts, by the rule of `get_gpt_decoder_block_spec` in `models/gpt/gpt_layer_specs.py`."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return frozenset(range(0, config.num_layers, frequency))
    return frozenset(layer for layer, sparse in enumerate(frequency) if sparse)
