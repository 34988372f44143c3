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
from weft_megatron.parameters import Part

_INSTALL = "pip install 'weft-megatron[megatron]'"
try:
    with warnings.catch_warnings():
        # Megatron warns at import about what is not installed beside it; none of that is used here.
        warnings.simplefilter("ignore")
        import megatron.core as megatron_core
        from megatron.core import parallel_state
        from megatron.core.activations import quick_gelu, squared_relu
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.mamba import MambaModel
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.moe.router import TopKRouter
except ImportError as error:
    raise PluginError(f"live Megatron models need megatron-core 0.16 ({error}): {_INSTALL}") from error
if not str(megatron_core.__version__).startswith("0.16."):
    raise PluginError(f"weft-megatron knows megatron-core 0.16, found {megatron_core.__version__}: {_INSTALL}")


FRAMEWORK = ("megatron-core", str(megatron_core.__version__))
"""For the facts of members (`weft.contracts.OfFramework`)."""
GATE_OF_GPT_OSS: Any = quick_gelu
"""Activation of its gates: a sigmoid with a gain of 1.702."""
ACTIVATION_OF_HYBRIDS: Any = squared_relu
"""Of MLPs without a gate."""

_LAYER = re.compile(r"(?P<at>decoder\.layers\.(?P<number>\d+)|mtp\.layers\.\d+\.transformer_layer)\.(?P<rest>.*)")
"""A parameter of a layer; prediction layers have the same numbers in every chunk."""

_EXPERT = re.compile(
    r"(?P<before>mlp\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(?P<number>\d+)(?P<after>.*)"
)
"""A parameter of one of a layer's local experts: `SequentialMLP` numbers modules, `TEGroupedMLP` parameters."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One pipeline chunk of a live model, out of its wrappers."""

    module: Any
    """The `GPTModel` or `MambaModel`."""
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
        """Global numbers of its layers, from 0; those that predict further tokens come after the last."""
        # TransformerLayer.layer_number counts from 1.
        decoder = (int(layer.layer_number) - 1 for layer in self.module.decoder.layers)
        after = int(self.module.config.num_layers)
        return (*decoder, *range(after, after + len(self._predictors)))

    @property
    def predictors(self) -> int:
        """How many layers of the whole model predict further tokens."""
        return int(self.module.config.mtp_num_layers or 0)

    @property
    def transformer_layers(self) -> dict[str, Any]:
        """Its decoder layers, and those inside of prediction layers, by the name they have in every chunk."""
        decoder = self.module.decoder.layers
        layers = {f"decoder.layers.{int(layer.layer_number) - 1}": layer for layer in decoder}
        inner = {f"mtp.layers.{n}.transformer_layer": each for n, each in enumerate(self._predictors)}
        return layers | {name: predictor.transformer_layer for name, predictor in inner.items()}

    @property
    def _predictors(self) -> Sequence[Any]:
        """All of a model's are in one chunk."""
        # A MambaModel knows of none.
        return self.module.mtp.layers if getattr(self.module, "mtp_process", False) else ()

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding that the model was built with."""
        return int(self.module.vocab_size)

    def global_name(self, name: str) -> str:
        """A parameter's name with the global layer number, and the global number of its expert (trap 6)."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return name
        at, rest = match["at"], match["rest"]
        if match["number"]:
            at = f"decoder.layers.{self.layers[int(match['number'])]}"
        if expert := _EXPERT.fullmatch(rest):
            number = self.transformer_layers[at].mlp.local_expert_indices[int(expert["number"])]
            rest = f"{expert['before']}{number}{expert['after']}"
        return f"{at}.{rest}"

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
    that is no `GPTModel` and no `MambaModel`.
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
    if not isinstance(module, GPTModel | MambaModel):
        raise ConfigError(
            f"expected a GPTModel or MambaModel, bare or in Float16Module and DistributedDataParallel, found {kind}"
        )
    for router in module.modules():
        if isinstance(router, TopKRouter):
            # Float16Module has cast its bias; the first forward pass would replace it by a float32 one elsewhere.
            router._maintain_float32_expert_bias()
    return Chunk(module, tuple(wrappers))


def _place(group: torch.distributed.ProcessGroup) -> Part:
    return Part(group.rank(), group.size())


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
