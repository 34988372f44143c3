"""The policy: a real Megatron-Core GPTModel, tensor parallel over gloo, and one policy-gradient step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import silu

from weft_cli.demo.settings import Settings

PAD_TO = 128
"""Megatron's default `make_vocab_size_divisible_by`."""


def padded_vocabulary(vocabulary: int, tensor_parallel: int) -> int:
    """Rows of Megatron's embedding: the vocabulary, up to a multiple of 128 per rank (`training/tokenizer`)."""
    step = PAD_TO * tensor_parallel
    return (vocabulary + step - 1) // step * step


def build_model(settings: Settings) -> GPTModel:
    """This rank's part of the policy, untrained. Collective: `parallel_state` is set up already."""
    sizes = settings.model
    config = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.feed_forward,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.key_value_heads,
        kv_channels=sizes.head_dim,
        tensor_model_parallel_size=settings.trainer_ranks,
        params_dtype=getattr(torch, settings.dtype),
        normalization="RMSNorm",
        layernorm_epsilon=sizes.norm_epsilon,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=padded_vocabulary(sizes.vocabulary, settings.trainer_ranks),
        max_sequence_length=sizes.positions,
        position_embedding_type="rope",
        rotary_base=int(sizes.rope_theta),
        share_embeddings_and_output_weights=False,
    )


def load_weights(model: GPTModel, checkpoint: Mapping[str, torch.Tensor], settings: Settings) -> None:
    """Copy this rank's part of a Hugging Face checkpoint into the model; padding rows of the vocabulary become zero."""
    sizes = settings.model
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), settings.trainer_ranks

    def rows(name: str) -> torch.Tensor:
        return _part(checkpoint[name], 0, rank, ranks)

    def columns(name: str) -> torch.Tensor:
        return _part(checkpoint[name], 1, rank, ranks)

    def vocabulary(name: str) -> torch.Tensor:
        padding = padded_vocabulary(sizes.vocabulary, ranks) - sizes.vocabulary
        return _part(torch.nn.functional.pad(checkpoint[name], (0, 0, 0, padding)), 0, rank, ranks)

    def grouped(prefix: str) -> torch.Tensor:
        """Megatron's rows of `linear_qkv`: per key-value head its query heads, then its key, then its value."""
        parts = [checkpoint[f"{prefix}.{part}_proj.weight"].unflatten(0, (sizes.key_value_heads, -1)) for part in "qkv"]
        return _part(torch.cat(parts, dim=1).flatten(0, 1), 0, rank, ranks)

    values = {
        "embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": checkpoint["model.norm.weight"],
        "output_layer.weight": vocabulary("lm_head.weight"),
    }
    for layer in range(sizes.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        values |= {
            f"{ours}.input_layernorm.weight": checkpoint[f"{theirs}.input_layernorm.weight"],
            f"{ours}.self_attention.linear_qkv.weight": grouped(f"{theirs}.self_attn"),
            f"{ours}.self_attention.q_layernorm.weight": checkpoint[f"{theirs}.self_attn.q_norm.weight"],
            f"{ours}.self_attention.k_layernorm.weight": checkpoint[f"{theirs}.self_attn.k_norm.weight"],
            f"{ours}.self_attention.linear_proj.weight": columns(f"{theirs}.self_attn.o_proj.weight"),
            f"{ours}.pre_mlp_layernorm.weight": checkpoint[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.mlp.linear_fc1.weight": torch.cat(
                [rows(f"{theirs}.mlp.{part}_proj.weight") for part in ("gate", "up")]
            ),
            f"{ours}.mlp.linear_fc2.weight": columns(f"{theirs}.mlp.down_proj.weight"),
        }
    parameters = dict(model.named_parameters())
    if parameters.keys() != values.keys():
        strangers = sorted(parameters.keys() ^ values.keys())
        raise ValueError(f"model and checkpoint do not have the same parameters: {', '.join(strangers)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _part(tensor: torch.Tensor, axis: int, rank: int, ranks: int) -> torch.Tensor:
    size = tensor.shape[axis] // ranks
    return tensor.narrow(axis, rank * size, size)


def token_log_probabilities(model: GPTModel, sequences: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token but the first given those before it: (batch, length) int64 to (batch, length - 1)
    float32.

    Collective over the tensor-parallel group: Megatron's own vocab-parallel cross entropy sums over the ranks' parts of
    the vocabulary.
    """
    inputs, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
    length = inputs.shape[1]
    positions = torch.arange(length).expand_as(inputs)
    hidden_from = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    losses: torch.Tensor = model(inputs, positions, hidden_from, labels=labels)
    return -losses


class Trainer:
    """Policy gradient with Adam, on the float32 parameters themselves."""

    def __init__(self, model: GPTModel, settings: Settings) -> None:
        self._model = model
        self._prompt_tokens = settings.prompt_tokens
        self._optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))

    def step(self, sequences: torch.Tensor, advantages: torch.Tensor) -> float:
        """One step on prompts with completions, (batch, prompt + new) int64, and advantages, (batch, new) float32.

        Returns the loss. Collective over the tensor-parallel group.
        """
        self._optimizer.zero_grad()
        taken = token_log_probabilities(self._model, sequences)[:, self._prompt_tokens - 1 :]
        loss = -(advantages * taken).mean()
        loss.backward()
        for name, parameter in self._model.named_parameters():
            if "q_layernorm" in name or "k_layernorm" in name:
                # Every rank applies these to its own heads only (distributed/finalize_model_grads.py sums them too).
                dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        self._optimizer.step()
        return float(loss.detach())
