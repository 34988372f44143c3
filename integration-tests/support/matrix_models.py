"""Tiny seeded Hugging Face models: checkpoints, prompts the reference answers clearly, greedy tokens, logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    # Two layers stay dense: fewer choices of experts that rounding could change, and both kinds in one model.
    "mlp_only_layers": [1, 3],
}
VOCABULARY = 259
"""A prime: every side pads it, each to a different size."""
PROMPT_TOKENS = 12
NEW_TOKENS = 8
TIE = 1e-3
"""Where the reference's two best logits are closer than this, either token is right."""
CLEAR = 0.1
"""Least distance of the reference's two best logits, in standard deviations of its logits, over a whole completion.

Rounding to bfloat16 moves a logit of these models by 0.016 to 0.02 of one (standard deviation, against float32).
"""
BATCH = 256
"""Prompts that the reference answers at once."""
ROUTED = 0.025
"""Least distance between a router's last chosen and first passed over logit, in standard deviations of its logits.

Where it is 0.02, bfloat16 and float32 gave different completions to 1 of 69 prompts, and to 50 of 360 at any distance.
"""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Which model: 4 layers, hidden 128, 4 heads of 32 in 2 key-value groups, so that 4 ranks split a group. With
    experts: 8 in every other layer, 2 for each token.
    """

    family: str
    tied: bool

    def config(self) -> Any:
        """The Hugging Face configuration."""
        return FAMILIES[self.family][0](
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            rms_norm_eps=1e-6,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            attn_implementation="eager",
            **(EXPERTS if self.family == "qwen3_moe" else {}),
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One version of a model's weights, on disk and as the reference that reads them."""

    path: str
    """Directory in Hugging Face's format."""
    reference: Any
    """The Hugging Face model with these weights, in the dtype they were saved in."""


def make_checkpoint(directory: Path, architecture: Architecture, dtype: torch.dtype, seed: int) -> Checkpoint:
    """Draw weights and save them.

    Norms are drawn around one and biases are not zero, so that a mistake in either shows; matrices are scaled so that
    every layer matters and logits are far apart.
    """
    model = FAMILIES[architecture.family][1](architecture.config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name:
                parameter.copy_(drawn * 0.1)
            elif parameter.ndim == 1:
                parameter.copy_(drawn * 0.3 + ("norm" in name))
            else:
                parameter.copy_(drawn * 1.3 * parameter.shape[-1] ** -0.5)
    path = directory / f"{architecture.family}-{'tied' if architecture.tied else 'untied'}-{seed}"
    model.to(dtype).eval().save_pretrained(path)
    return Checkpoint(str(path), model)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the reference says to a prompt."""

    prompt: list[int]
    tokens: list[int]
    """Its greedy completion."""
    margins: list[float]
    """Per token, how far the two best logits are apart."""


def clear_answers(model: Any, count: int, seed: int, candidates: int = 8192) -> list[Answer]:
    """Answers to the first `count` of `candidates` random prompts in whose completions the reference never hesitates.

    Rounding differs between implementations and machines; where the two best logits nearly agree, or two experts, it
    decides. Only the reference has a say in the choice. Raises `AssertionError` when there are too few.
    """
    generator = torch.Generator().manual_seed(seed)
    answers: list[Answer] = []
    for _ in range(candidates // BATCH):
        answers += _clear_answers(model, torch.randint(1, VOCABULARY, (BATCH, PROMPT_TOKENS), generator=generator))
        if len(answers) >= count:
            return answers[:count]
    raise AssertionError(f"the reference is clear about {len(answers)} of {candidates} prompts, not {count}")


@torch.no_grad()
def _clear_answers(model: Any, prompts: torch.Tensor) -> list[Answer]:
    """Answers to those of the prompts about which the reference is clear."""
    generated = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(generated.logits, dim=1).float()
    best = logits.topk(2, dim=-1).values
    margins = best[..., 0] - best[..., 1]
    clear = (margins.amin(dim=1) >= CLEAR * logits.std()) & clearly_routed(model, generated.sequences)
    tokens = generated.sequences[:, PROMPT_TOKENS:]
    return [Answer(prompts[n].tolist(), tokens[n].tolist(), margins[n].tolist()) for n in clear.nonzero().flatten()]


@torch.no_grad()
def clearly_routed(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Which of the sequences, (batch, length), send every token to experts that rounding does not change: (batch,)
    bool. All of them where there are no experts.
    """
    clear = torch.ones(len(sequences), dtype=torch.bool)
    if model.config.model_type == "qwen3_moe":
        chosen = model.config.num_experts_per_tok
        for logits in model(sequences, output_router_logits=True).router_logits:
            best = logits.float().topk(chosen + 1, dim=-1).values
            margins = (best[..., -2] - best[..., -1]).view(len(sequences), -1)
            clear &= margins.amin(dim=1) >= ROUTED * logits.float().std()
    return clear


def ties_and_faults(answers: list[Answer], found: list[list[int]]) -> tuple[int, list[str]]:
    """Compare an engine's greedy completions: (completions that part from the reference's at a tie, all other faults).

    After the first different token two completions have nothing in common, so one tie excuses what follows it.
    """
    ties, faults = 0, []
    for answer, tokens in zip(answers, found, strict=True):
        parted = [n for n, pair in enumerate(zip(answer.tokens, tokens, strict=True)) if pair[0] != pair[1]]
        if parted and answer.margins[parted[0]] < TIE:
            ties += 1
        elif parted:
            faults.append(
                f"prompt {answer.prompt}: expected {answer.tokens}, found {tokens}; they part at {parted[0]}, where "
                f"the reference's best logit leads by {answer.margins[parted[0]]:.4f}"
            )
    return ties, faults
