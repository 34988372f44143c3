"""All that depends on the version of Megatron-Core: imports, wrappers, attributes of models and configs.

Written against Megatron-Core 0.16.1 (`core/models/gpt/gpt_model.py`, `core/distributed/distributed_data_parallel.py`,
`core/transformer/transformer_config.py`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.errors import ConfigError, NotSupportedError, PluginError
from weft_megatron.family import DecoderModel
from weft_megatron.parameters import Part

_INSTALL = "pip install 'weft-megatron[megatron]'"
try:
    with warnings.catch_warnings():
        # Megatron warns at import about what is not installed beside it; none of that is used here.
        warnings.simplefilter("ignore")
        import megatron.core as megatron_core
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.models.gpt import GPTModel
        from megatron.core.transformer.module import Float16Module
except ImportError as error:
    raise PluginError(f"live Megatron models need megatron-core 0.16 ({error}): {_INSTALL}") from error
if not str(megatron_core.__version__).startswith("0.16."):
    raise PluginError(f"weft-megatron knows megatron-core 0.16, found {megatron_core.__version__}: {_INSTALL}")


_EXPERT = re.compile(
    r"(?P<before>mlp\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(?P<number>\d+)(?P<after>.*)"
)
"""A parameter of one of a layer's local experts: `SequentialMLP` numbers modules, `TEGroupedMLP` parameters."""

_LEGACY = "GroupedMLP"
"""All local experts in two transposed tensors; needs the package grouped_gemm."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One pipeline chunk of a live model, out of its wrappers."""

    module: Any
    """The `GPTModel`."""
    data_parallel: tuple[Any, ...]
    """`DistributedDataParallel` wrappers found around it."""

    @property
    def tensor(self) -> Part:
        """Place in the tensor-parallel group that the model was built with."""
        return _place(self.module.pg_collection.tp)

    @property
    def experts(self) -> Part:
        """Place in its expert-parallel group."""
        return _place(self.module.pg_collection.ep)

    @property
    def expert_tensor(self) -> Part:
        """Place in the group that divides each of its experts."""
        return _place(self.module.pg_collection.expt_tp)

    @property
    def first(self) -> bool:
        """Whether it holds the embedding."""
        return bool(self.module.pre_process)

    @property
    def last(self) -> bool:
        """Whether it holds the final norm and the output projection."""
        return bool(self.module.post_process)

    @property
    def layers(self) -> tuple[int, ...]:
        """Global numbers of its layers, from 0 (`TransformerLayer.layer_number` counts from 1)."""
        return tuple(int(layer.layer_number) - 1 for layer in self.module.decoder.layers)

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding that the model was built with."""
        return int(self.module.vocab_size)

    def global_name(self, name: str) -> str:
        """A parameter's name with the global layer number, and the global number of its expert (trap 6)."""
        prefix = "decoder.layers."
        if not name.startswith(prefix):
            return name
        number, _, rest = name.removeprefix(prefix).partition(".")
        layer = self.module.decoder.layers[int(number)]
        if match := _EXPERT.fullmatch(rest):
            expert = layer.mlp.local_expert_indices[int(match["number"])]
            rest = f"{match['before']}{expert}{match['after']}"
        return f"{prefix}{self.layers[int(number)]}.{rest}"

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Local names and live tensors of all parameters and persistent buffers; shared parameters come once."""
        yield from self.module.named_parameters()
        skipped = set(self.transient_buffers())
        yield from ((name, buffer) for name, buffer in self.module.named_buffers() if name not in skipped)

    def transient_buffers(self) -> Iterator[str]:
        """Local names of the buffers that are no part of a checkpoint."""
        for path, module in self.module.named_modules():
            for name in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name


def chunks_of(model: Any) -> list[Chunk]:
    """The chunks of a model: bare, in a list (virtual pipeline stages), wrapped in `Float16Module` and DDP.

    Raises `NotSupportedError` for wrappers that hold parameters in shards of their own, and `ConfigError` for a model
    that is no `GPTModel`.
    """
    given = list(model) if isinstance(model, Sequence | torch.nn.ModuleList) else [model]
    if not given:
        raise ConfigError("expected a Megatron model or a list of its chunks, found an empty list")
    return [_unwrap(chunk) for chunk in given]


def _unwrap(module: Any) -> Chunk:
    wrappers = []
    while isinstance(module, DistributedDataParallel | Float16Module):
        if isinstance(module, DistributedDataParallel):
            wrappers.append(module)
        module = module.module
    kind = type(module).__name__
    if "FullyShardedDataParallel" in kind:
        raise NotSupportedError(
            f"{kind}: its parameters are sharded once more; weft-megatron takes DistributedDataParallel"
        )
    if not isinstance(module, GPTModel):
        raise ConfigError(f"expected a GPTModel, bare or in Float16Module and DistributedDataParallel, found {kind}")
    return Chunk(module, tuple(wrappers))


def _place(group: torch.distributed.ProcessGroup) -> Part:
    return Part(group.rank(), group.size())


def config_faults(chunk: Chunk, model: DecoderModel) -> list[str]:
    """Where the model's own configuration contradicts the Hugging Face config."""
    config = chunk.module.config
    expected: dict[str, object] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.groups,
        "kv_channels": model.head,
        "gated_linear_unit": True,
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "normalization": "RMSNorm",
        # These change what stored values mean.
        "layernorm_zero_centered_gamma": False,
        "rotary_interleaved": False,
        "multi_latent_attention": False,
        "mtp_num_layers": None,
        "attention_output_gate": False,
        "activation_func": torch.nn.functional.silu,
        "activation_func_clamp_value": None,
        "glu_linear_offset": 0.0,
        **_expected_experts(model),
    }
    if model.dense_layers:
        expected["ffn_hidden_size"] = model.intermediate
    # add_bias_linear implies the qkv biases whatever add_qkv_bias says.
    ignored = {"add_qkv_bias"} if model.linear_bias else set()
    faults = [
        f"the model was built with {name}={getattr(config, name)!r}, {model.family} of this config needs {value!r}"
        for name, value in expected.items()
        if name not in ignored and getattr(config, name) != value
    ]
    if model.experts and _sparse_layers(config) != model.sparse_layers:
        faults.append(
            f"the model was built with moe_layer_freq={config.moe_layer_freq!r}, {model.family} of this config has "
            f"experts in the layers {sorted(model.sparse_layers)}"
        )
    if model.experts and config.moe_router_load_balancing_type == "sinkhorn":
        faults.append("moe_router_load_balancing_type='sinkhorn' routes in a way that no checkpoint can express")
    if any(type(getattr(layer.mlp, "experts", None)).__name__ == _LEGACY for layer in chunk.module.decoder.layers):
        faults.append(f"experts are in the legacy grouped layout ({_LEGACY}); build SequentialMLP or TEGroupedMLP")
    if bool(chunk.module.share_embeddings_and_output_weights) != model.tied:
        faults.append(
            f"the model was built with share_embeddings_and_output_weights="
            f"{chunk.module.share_embeddings_and_output_weights}, the config says tie_word_embeddings={model.tied}"
        )
    return faults


def _expected_experts(model: DecoderModel) -> dict[str, object]:
    """What the configuration of a model with these experts, or with none, must say."""
    if model.experts is None:
        return {"num_moe_experts": None}
    return {
        "num_moe_experts": model.experts.count,
        "moe_ffn_hidden_size": model.experts.intermediate,
        "moe_router_topk": model.experts.chosen,
        # Softmax over the chosen experts alone gives weights that add up to one.
        "moe_router_pre_softmax": not model.experts.normalized,
        "moe_router_score_function": "softmax",
        # No checkpoint of the family has a place for these, or they give stored values another meaning.
        "moe_router_enable_expert_bias": False,
        "moe_router_topk_scaling_factor": None,
        "moe_router_num_groups": None,
        "moe_apply_probs_on_input": False,
        "moe_shared_expert_intermediate_size": None,
        "moe_latent_size": None,
    }


def _sparse_layers(config: Any) -> frozenset[int]:
    """The layers with experts, by the rule of `get_gpt_decoder_block_spec` in `models/gpt/gpt_layer_specs.py`."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return frozenset(range(0, config.num_layers, frequency))
    return frozenset(layer for layer, sparse in enumerate(frequency) if sparse)


def finish_parameter_gathers(chunks: Sequence[Chunk]) -> None:
    """Gather what an overlapped parameter gather has left for the next forward pass (trap 66).

    The distributed optimizer with `overlap_param_gather` updates only its own shard in a step; forward hooks gather the
    rest later. Collective over each data-parallel group in that case, else local.
    """
    for wrapper in {id(wrapper): wrapper for chunk in chunks for wrapper in chunk.data_parallel}.values():
        if wrapper.ddp_config.use_distributed_optimizer and wrapper.ddp_config.overlap_param_gather:
            wrapper.start_param_sync(force_sync=True)


def global_rank() -> int:
    """This process's rank in the Megatron job. Raises `ConfigError` before Megatron's groups exist."""
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError("Megatron's groups do not exist yet: call parallel_state.initialize_model_parallel first")
    return int(torch.distributed.get_rank())
