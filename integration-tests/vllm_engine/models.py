"""Tiny seeded checkpoints and reference tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from weft.layout import Kind, Layout
from weft_vllm.parameters import LOADER


def vision_language_config(**text: Any) -> Any:
    """Of a decoder of these sizes, and a tower of two layers."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    tower = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 128}
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config={**tower, "fullatt_block_indexes": [1]},
        tie_word_embeddings=text["tie_word_embeddings"], vision_start_token_id=250, vision_end_token_id=251,
        image_token_id=252, video_token_id=253,
    )  # fmt: skip


def nemotron_config(num_hidden_layers: int, **more: Any) -> Any:
    """Of the layers that `layers_block_type` lists, however many they are."""
    return NemotronHConfig(**more)


FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "nemotron_h": (nemotron_config, NemotronHForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
    "qwen2_5_vl": (vision_language_config, Qwen2_5_VLForConditionalGeneration),
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
    },
    "glm4_moe": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256},
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
        "q_lora_rank": 96, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
        "head_dim": 64,
        "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc",
    },
    "qwen3_next": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 4, "linear_key_head_dim": 128, "linear_num_value_heads": 8,
        "linear_value_head_dim": 128, "layer_types": ["linear_attention", "full_attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp", "linear_attention"],
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 96, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 4,
        "ssm_state_size": 16,
    },
    "glm_moe_dsa": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
        "q_lora_rank": 96, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
        "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc", "index_n_heads": 4, "index_head_dim": 128,
    },
}  # fmt: skip
"""Of mixtures; widths that every CPU kernel of vLLM takes as they are, also halved, and the one size of heads that its
multi-latent attention takes (576)."""
VOCABULARY = 259
PROMPT_TOKENS = 12
NEW_TOKENS = 16


def make_model(family: str, *, tied: bool, kv_heads: int, seed: int, dtype: torch.dtype, **more: Any) -> Any:
    """A model of 2 layers, 4 heads of 32, hidden 128; weights so large that logits are far apart."""
    config_class, model_class = FAMILIES[family]
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": 32, "max_position_embeddings": 512,
        "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = config_class(**{**shape, **EXPERTS.get(family, {}), **more})
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.12 if parameter.ndim >= 2 else 0.3
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if "norm" in name else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model.to(dtype).eval()


def save_checkpoint(directory: Path, **options: Any) -> Any:
    """Save a model as `save_pretrained` does; returns it."""
    model = make_model(**options)
    model.save_pretrained(directory)
    return model


def prompts(count: int, length: int = PROMPT_TOKENS, seed: int = 99) -> list[list[int]]:
    """Fixed random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (count, length), generator=generator).tolist()


@torch.no_grad()
def reference_tokens(model: Any, asked: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of the Hugging Face model."""
    inputs = torch.tensor(asked)
    tokens = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[:, inputs.shape[1] :].tolist()


@torch.no_grad()
def gaps(model: Any, asked: list[list[int]], got: list[list[int]], want: list[list[int]]) -> list[float]:
    """How far the reference's two best logits are apart at the first difference, per prompt whose answer differs."""
    found = []
    for prompt, answer, reference in zip(asked, got, want, strict=True):
        if answer != reference:
            first = next(n for n, (a, b) in enumerate(zip(answer, reference, strict=True)) if a != b)
            best = model(torch.tensor([prompt + reference[:first]])).logits[0, -1].float().topk(2).values
            found.append(float(best[0] - best[1]))
    return found


def as_loaded(layout: Layout) -> Layout:
    """A recorded layout without what only a live engine says: what it leaves out, and which buffers it packs."""
    plain = tuple(
        buffer if buffer.name.startswith(LOADER) else msgspec.structs.replace(buffer, kind=Kind.LIVE)
        for buffer in layout.buffers
    )
    return replace(layout, skipped=(), buffers=plain)
