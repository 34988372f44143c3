"""Small Megatron-Core models on a machine without CUDA, built from a Hugging Face config: the demo's and the tests'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig


def answer_cuda_calls() -> None:
    """Let this process run Megatron models on CPU: answer what only CUDA answers. Nothing else in weft does this.

    Call once, before a model is built, and only in a process of a demo, a benchmark or a test; does nothing where CUDA
    is available.

    `models/common/embeddings/rotary_pos_embedding.py` and `transformer/moe/router.py` ask for the current device;
    `models/common/language_module/language_module.py` moves tied embeddings; `transformer/dot_product_attention.py`
    forks the CUDA random state around dropout, which is 0 here; `transformer/moe/moe_utils.py` looks for a name that
    is not there without Transformer Engine.
    """
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    CudaRNGStatesTracker.fork = _no_fork
    moe_utils.te_general_gemm = None


@contextmanager
def _no_fork(tracker: CudaRNGStatesTracker, name: str = "") -> Iterator[None]:
    yield


def transformer_config(
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    kind: type[TransformerConfig] = TransformerConfig,
    **options: Any,
) -> TransformerConfig:
    """Megatron's configuration of a Llama, Qwen2, Qwen3 or Qwen3-MoE, for the groups that exist in this process.

    `options` come on top: whatever other families need.
    """
    heads = config["num_attention_heads"]
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    common: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": bool(config.get("mlp_bias")),
        "add_qkv_bias": config["model_type"] == "qwen2",
        "qk_layernorm": config["model_type"] in ("qwen3", "qwen3_moe"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": chunks,
    }
    if config["model_type"] == "qwen3_moe":
        common |= _expert_options(config)
    return kind(**(common | options))


def _expert_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_moe_experts": expert_count(config),
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_layer_freq": [int(layer in sparse_layers(config)) for layer in range(config["num_hidden_layers"])],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_pre_softmax": not config["norm_topk_prob"],
        **experts_on_cpu(),
    }


def experts_on_cpu() -> dict[str, Any]:
    """What every model with experts needs here.

    The all-to-all dispatcher makes a CUDA stream; the one that gathers runs over gloo.
    """
    return {
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def expert_count(config: Mapping[str, Any]) -> int:
    """Experts of a sparse layer, 0 in a dense model; transformers 5 writes another name than files have had before."""
    return int(config.get("num_experts", config.get("num_local_experts", 0)))


def sparse_layers(config: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers that have experts."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return [layer for layer in range(config["num_hidden_layers"]) if (layer + 1) % step == 0 and layer not in dense]


def build_model(
    config: Mapping[str, Any],
    *,
    padded_vocabulary: int,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
    parallel_output: bool = False,
    **options: Any,
) -> GPTModel:
    """This rank's part of the model, or one of its virtual pipeline chunks; weights are Megatron's random ones.

    With `parallel_output` every tensor-parallel rank gives its own part of the logits, which Megatron's loss needs.
    `options` are more fields of `TransformerConfig`. Collective: `parallel_state` is set up already.
    """
    transformer = transformer_config(config, dtype, **options)
    pp = parallel_state.get_pipeline_model_parallel_rank()
    last = parallel_state.get_pipeline_model_parallel_world_size() - 1
    chunks = transformer.virtual_pipeline_model_parallel_size or 1
    return GPTModel(
        transformer,
        get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=False, normalization="RMSNorm", vp_stage=chunk, pp_rank=pp
        ),
        vocab_size=padded_vocabulary,
        max_sequence_length=config["max_position_embeddings"],
        pre_process=pp == 0 and chunk in (None, 0),
        post_process=pp == last and chunk in (None, chunks - 1),
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=rope_theta(config),
        vp_stage=chunk,
    )


def rope_theta(config: Mapping[str, Any]) -> float:
    """Base period of the rotary embedding; only the unscaled kind."""
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r}: only 'default' is known here")
    return float(rope["rope_theta"])
