"""Tiny seeded checkpoints, reference tokens, and what every engine parameter must hold, sliced by hand."""

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
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from weft.layout import Kind, Layout

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
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
        "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc",
    },
}  # fmt: skip
"""Of mixtures; widths that every CPU kernel of vLLM takes as they are, also halved."""
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
    plain = tuple(msgspec.structs.replace(buffer, kind=Kind.LIVE) for buffer in layout.buffers)
    return replace(layout, skipped=(), buffers=plain)


def expected_parameters(
    state: dict[str, torch.Tensor], config: dict[str, Any], rank: int, ranks: int, dtype: torch.dtype,
    expert_parallel: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Every parameter of a vLLM rank as loaded, cut from a Hugging Face state by hand and without weft."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    kv_here = max(1, kv_heads // ranks)
    kv_first = rank * kv_heads // ranks

    def rows(tensor: torch.Tensor, first: int, count: int) -> torch.Tensor:
        return tensor[first : first + count]

    def vocabulary(tensor: torch.Tensor) -> torch.Tensor:
        padded = -(-tensor.shape[0] // 64) * 64
        whole = torch.zeros(padded, tensor.shape[1], dtype=tensor.dtype)
        whole[: tensor.shape[0]] = tensor
        return rows(whole, rank * padded // ranks, padded // ranks)

    tied = config["tie_word_embeddings"]
    out = {
        "model.embed_tokens.weight": vocabulary(state["model.embed_tokens.weight"]),
        "lm_head.weight": vocabulary(state["model.embed_tokens.weight" if tied else "lm_head.weight"]),
        "model.norm.weight": state["model.norm.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        for kind in ("weight", "bias"):
            if f"{attention}.q_proj.{kind}" in state:
                q, k, v = (state[f"{attention}.{part}_proj.{kind}"] for part in "qkv")
                here = heads // ranks * size
                out[f"{attention}.qkv_proj.{kind}"] = torch.cat(
                    [
                        rows(q, rank * here, here),
                        rows(k, kv_first * size, kv_here * size),
                        rows(v, kv_first * size, kv_here * size),
                    ]
                )
        out[f"{attention}.o_proj.weight"] = state[f"{attention}.o_proj.weight"].chunk(ranks, 1)[rank]
        if f"{mlp}.gate.weight" in state:
            out[f"{mlp}.gate.weight"] = state[f"{mlp}.gate.weight"]
            experts, cut = range(config["num_local_experts"]), (rank, ranks)
            if expert_parallel:
                here = len(experts) // ranks
                experts, cut = experts[rank * here : (rank + 1) * here], (0, 1)
            halves = [_mlp(state, f"{mlp}.experts.{expert}", *cut) for expert in experts]
            for number, name in enumerate(("w13_weight", "w2_weight")):
                out[f"{mlp}.experts.routed_experts.{name}"] = torch.stack([half[number] for half in halves])
        else:
            out[f"{mlp}.gate_up_proj.weight"], out[f"{mlp}.down_proj.weight"] = _mlp(state, mlp, rank, ranks)
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            if f"{prefix}.{norm}.weight" in state:
                out[f"{prefix}.{norm}.weight"] = state[f"{prefix}.{norm}.weight"]
    return {name: tensor.to(dtype).contiguous() for name, tensor in out.items()}


def _mlp(state: dict[str, torch.Tensor], name: str, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate over up, and down, of one rank."""
    gate, up, down = (state[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]]), down.chunk(ranks, 1)[rank]
