"""All that depends on the version of Megatron-Core: imports, wrappers, attributes of models and configs.

Written against Megatron-Core 0.16.1 (`core/models/gpt/gpt_model.py`, `core/distributed/distributed_data_parallel.py`,
`core/transformer/transformer_config.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.errors import ConfigError, NotSupportedError, PluginError
from weft_megatron.family import DenseModel

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


@dataclass(frozen=True, slots=True)
class Chunk:
    """One pipeline chunk of a live model, out of its wrappers."""

    module: Any
    """The `GPTModel`."""
    data_parallel: tuple[Any, ...]
    """`DistributedDataParallel` wrappers found around it."""

    @property
    def tensor_rank(self) -> int:
        """Rank in the tensor-parallel group that the model was built with."""
        return int(self.module.pg_collection.tp.rank())

    @property
    def tensor_size(self) -> int:
        """Size of that group."""
        return int(self.module.pg_collection.tp.size())

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
        """A parameter's name with the global layer number."""
        prefix = "decoder.layers."
        if not name.startswith(prefix):
            return name
        number, _, rest = name.removeprefix(prefix).partition(".")
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


def config_faults(chunk: Chunk, model: DenseModel) -> list[str]:
    """Where the model's own configuration contradicts the Hugging Face config."""
    config = chunk.module.config
    expected: Mapping[str, object] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.intermediate,
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
        "num_moe_experts": None,
        "mtp_num_layers": None,
        "attention_output_gate": False,
    }
    # add_bias_linear implies the qkv biases whatever add_qkv_bias says.
    ignored = {"add_qkv_bias"} if model.linear_bias else set()
    faults = [
        f"the model was built with {name}={getattr(config, name)!r}, {model.family} of this config needs {value!r}"
        for name, value in expected.items()
        if name not in ignored and getattr(config, name) != value
    ]
    if bool(chunk.module.share_embeddings_and_output_weights) != model.tied:
        faults.append(
            f"the model was built with share_embeddings_and_output_weights="
            f"{chunk.module.share_embeddings_and_output_weights}, the config says tie_word_embeddings={model.tied}"
        )
    return faults


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
