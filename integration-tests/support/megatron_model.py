"""Tiny Megatron-Core models on CPU, built from a Hugging Face config.

Call `answer_cuda_calls` first, and only in a process that is a test or a demo: it replaces functions of torch and
Megatron-Core that need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.transformer_config import TransformerConfig

WAIT = timedelta(seconds=120)


def answer_cuda_calls() -> None:
    """Let Megatron run without CUDA: its rotary embedding, random state and tied embeddings ask for it by name."""

    @contextmanager
    def no_fork(self: Any, name: str = "") -> Iterator[None]:
        yield

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda self, *_, **__: self
    CudaRNGStatesTracker.fork = no_fork


def start_job(rank: int, world: int, rendezvous: str, **sizes: Any) -> None:
    """Join the process group over gloo and make Megatron's groups; `sizes` go to `initialize_model_parallel`.

    `rendezvous` is the path of a file that does not exist yet.
    """
    answer_cuda_calls()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=WAIT
    )
    parallel_state.initialize_model_parallel(**sizes)


def end_job() -> None:
    """Undo `start_job`."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def transformer_config(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> TransformerConfig:
    """Megatron's configuration of a dense Llama, Qwen2 or Qwen3, for the groups that exist in this process."""
    heads = config["num_attention_heads"]
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=bool(config.get("mlp_bias")),
        add_qkv_bias=config["model_type"] == "qwen2",
        qk_layernorm=config["model_type"] == "qwen3",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=chunks,
    )


def build_model(
    config: Mapping[str, Any], *, padded_vocabulary: int, dtype: torch.dtype = torch.float32, chunk: int | None = None
) -> GPTModel:
    """This rank's part of the model, or one of its virtual pipeline chunks; weights are Megatron's random ones."""
    transformer = transformer_config(config, dtype)
    pp = parallel_state.get_pipeline_model_parallel_rank()
    last = parallel_state.get_pipeline_model_parallel_world_size() - 1
    chunks = transformer.virtual_pipeline_model_parallel_size or 1
    return GPTModel(
        transformer,
        get_gpt_layer_local_spec(qk_layernorm=transformer.qk_layernorm, normalization="RMSNorm"),
        vocab_size=padded_vocabulary,
        max_sequence_length=config["max_position_embeddings"],
        pre_process=pp == 0 and chunk in (None, 0),
        post_process=pp == last and chunk in (None, chunks - 1),
        parallel_output=False,
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=rope_theta(config),
        vp_stage=chunk,
    )


def rope_theta(config: Mapping[str, Any]) -> float:
    """Base period of the rotary embedding; only the unscaled kind."""
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r}: these helpers know only 'default'")
    return float(rope["rope_theta"])


def logits_of(model: GPTModel, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits of a model that is one pipeline stage: shape (batch, length, vocabulary), padding cut off.

    Collective over the tensor-parallel group.
    """
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
