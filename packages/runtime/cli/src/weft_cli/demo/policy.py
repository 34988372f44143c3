"""The policy: a real Megatron-Core GPTModel, tensor or expert parallel over gloo, and one policy-gradient step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from weft_cli.demo.megatron_on_cpu import build_model
from weft_cli.demo.megatron_slices import Cut
from weft_cli.demo.settings import Settings

PAD_TO = 128
"""Megatron's default `make_vocab_size_divisible_by`."""


def padded_vocabulary(vocabulary: int, tensor_parallel: int) -> int:
    """Rows of Megatron's embedding: the vocabulary, up to a multiple of 128 per rank (`training/tokenizer`)."""
    step = PAD_TO * tensor_parallel
    return (vocabulary + step - 1) // step * step


def make_policy(config: Mapping[str, Any], checkpoint: Mapping[str, torch.Tensor], dtype: torch.dtype) -> GPTModel:
    """This rank's part of the policy, with the weights of a Hugging Face checkpoint; padding rows of the vocabulary
    are zero. Collective: `parallel_state` is set up already.
    """
    padded = padded_vocabulary(config["vocab_size"], parallel_state.get_tensor_model_parallel_world_size())
    model = build_model(config, padded_vocabulary=padded, dtype=dtype, parallel_output=True)
    cut = Cut.here(config, padded, 0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(cut.parameter(name, checkpoint))
    return model


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

        Returns the loss. Collective over all ranks; every one gets the whole batch, and data-parallel ones take equal
        parts of it.
        """
        replicas = parallel_state.get_data_parallel_group()
        rank, ranks = replicas.rank(), replicas.size()
        own = slice(rank * len(sequences) // ranks, (rank + 1) * len(sequences) // ranks)
        self._optimizer.zero_grad()
        taken = token_log_probabilities(self._model, sequences[own])[:, self._prompt_tokens - 1 :]
        loss = -(advantages[own] * taken).mean()
        loss.backward()
        combine_gradients(self._model)
        self._optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total, group=replicas)
        return float(total / ranks)


def combine_gradients(model: GPTModel) -> None:
    """Make gradients of this rank's loss those of the mean over data-parallel ranks. Collective over all ranks."""
    replicas, expert_replicas = (
        parallel_state.get_data_parallel_group(),
        parallel_state.get_expert_data_parallel_group(),
    )
    for name, parameter in model.named_parameters():
        if "q_layernorm" in name or "k_layernorm" in name:
            # Every rank applies these to its own heads only (distributed/finalize_model_grads.py sums them too).
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        # An expert has met the tokens of all ranks that share its layer: their losses are summed in it already.
        expert = not getattr(parameter, "allreduce", True)
        dist.all_reduce(parameter.grad, group=expert_replicas if expert else replicas)
        parameter.grad /= replicas.size()
