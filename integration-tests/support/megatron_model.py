"""Megatron-Core jobs on CPU in tests: process groups, and forward passes by hand. Models are built by the demo's
helpers.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from weft_cli.demo.megatron_on_cpu import answer_cuda_calls

WAIT = timedelta(seconds=120)


def start_job(rank: int, world: int, rendezvous: str, **sizes: Any) -> None:
    """Join the process group over gloo and make Megatron's groups; `sizes` go to `initialize_model_parallel`.

    `rendezvous` is the path of a file that does not exist yet.
    """
    answer_cuda_calls()
    torch.set_num_threads(1)
    # Megatron compiles small functions such as gates, anew for every size: that takes long, and some do not compile.
    torch.compiler.set_stance("force_eager")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=WAIT
    )
    parallel_state.initialize_model_parallel(**sizes)


def end_job() -> None:
    """Undo `start_job`."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def logits_of(model: GPTModel, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits of a model that is one pipeline stage: shape (batch, length, vocabulary), padding cut off.

    Collective over the tensor-parallel and the expert-parallel group.
    """
    # In training Megatron wants experts under tensor parallelism to have sequence parallelism, which torch's norm has
    # not.
    model.eval()
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    masked = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    logits: torch.Tensor = model(tokens, positions, masked)
    return logits[..., :vocabulary]


def stage_logits(model: GPTModel, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor | None:
    """The same over pipeline stages, run by hand because Megatron's schedules allocate on CUDA; None before the last.

    Collective over the model-parallel groups.
    """
    batch, length = tokens.shape
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(length, batch, model.config.hidden_size)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = logits_of(model, tokens, vocabulary if model.post_process else model.config.hidden_size)
    if model.post_process:
        return output
    torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None
