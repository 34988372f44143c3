"""Tiny random Transformers models of many families."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
        "shared_expert_intermediate_size": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "bamba": {
        "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "attn_layer_indices": [1],
    },
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "num_hidden_layers": None,
        "moe_shared_expert_intermediate_size": 8, "layers_block_type": ["mamba", "attention", "moe", "mlp"],
    },
}  # fmt: skip
"""Sizes of families whose layers are not all attention."""
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 16,
    "fullatt_block_indexes": [1],
}


def tiny_config(family: str) -> PretrainedConfig:
    """Of a random model of a family, with its vision tower if it has one."""
    sizes = COMMON | {"num_key_value_heads": 2, "eos_token_id": None, "bos_token_id": None}
    if "_vl" in family:
        return AutoConfig.for_model(family, text_config=sizes, vision_config=VISION)
    sizes |= EXPERTS | HYBRID.get(family, {})
    if family in ("deepseek_v3", "glm_moe_dsa"):
        sizes |= LATENT | {"index_n_heads": 2, "index_head_dim": 8}
        del sizes["head_dim"]
    if family == "gpt_oss":
        sizes["rope_parameters"] = {"rope_type": "default"}
    return AutoConfig.for_model(family, **sizes)


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Always the same for a config."""
    torch.manual_seed(1)
    maker = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return maker.from_config(config)


def tiny(family: str) -> PreTrainedModel:
    """A random model of a family."""
    return random_model(tiny_config(family))
