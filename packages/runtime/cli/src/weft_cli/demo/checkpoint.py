"""The initial weights: a tiny Qwen3 or Qwen3-MoE, seeded, saved as Hugging Face would."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig
from transformers.utils import logging

from weft_cli.demo.settings import Settings


def config_of(settings: Settings) -> PreTrainedConfig:
    """The Hugging Face configuration that all sides are built from."""
    sizes = settings.model
    common = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.positions,
        "rope_theta": sizes.rope_theta,
        "rms_norm_eps": sizes.norm_epsilon,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": settings.dtype,
    }
    if not sizes.experts:
        return Qwen3Config(**common)
    return Qwen3MoeConfig(
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.experts_per_token,
        moe_intermediate_size=sizes.expert_feed_forward,
        norm_topk_prob=True,
        **common,
    )


def write_checkpoint(settings: Settings) -> None:
    """Draw the weights and save them to `settings.checkpoint`.

    Hugging Face's own initial scale (0.02) makes logits nearly equal, and greedy decoding a lottery; these scales keep
    activations near one and spread the logits, and leave norm weights near one but different, so that a norm in the
    wrong place shows.
    """
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(config_of(settings))
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.05, generator=generator)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    model.to(getattr(torch, settings.dtype)).save_pretrained(settings.checkpoint)
