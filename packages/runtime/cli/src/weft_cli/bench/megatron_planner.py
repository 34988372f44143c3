"""Megatron-Core's own resharding planner on synthetic metadata, in one process: `megatron/core/resharding` 0.16.

Its functions run unchanged. What they would gather from all ranks is made here; the collectives hand it over. Every
parameter gets the strides with which the planner divides it rightly (2 for gate and up in one matrix), lists of ranks
are shared between the parameters of a rank, and reading live modules and pickling are left out: all in its favour.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from weft.errors import ConfigError
from weft_cli.bench.isolated import rss_bytes
from weft_cli.bench.results import Planned

_MODULES = ("megatron.core.resharding.planner", "megatron.core.resharding.utils")
_INSTALL = "pip install megatron-core==0.16.1"
_VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parallel sizes of one side. Ranks count tensor, expert or data, pipeline from the fastest to the slowest."""

    tp: int
    pp: int
    dp: int
    ep: int
    etp: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp},pp{self.pp},dp{self.dp},ep{self.ep},etp{self.etp}"


def megatron_version() -> str:
    """The installed version of Megatron-Core. Raises `ConfigError` that says what to install."""
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"the comparison needs Megatron-Core's resharding planner: {_INSTALL}") from None


def run_megatron(config: Mapping[str, Any], source: Sizes, target: Sizes) -> Planned:
    """Plan on what would be rank 0. Target ranks follow the source ranks in one world, as the planner wants it.

    `config` is a Qwen3-MoE's. Raises `ConfigError` without megatron-core.
    """
    planner, utils = _planner()
    world = source.world + target.world
    held = [_metadata(utils, config, source, rank, 0) for rank in range(source.world)]
    wanted = [_metadata(utils, config, target, rank, source.world) for rank in range(target.world)]
    nothing: list[list[Any]] = [[]]
    collectives = _Collectives(world, [held + nothing * target.world, nothing * source.world + wanted])
    before, start = rss_bytes()[0], time.perf_counter()
    with (
        patch.object(planner, "dist", collectives),
        patch.object(torch.distributed, "broadcast_object_list", collectives.keep),
    ):
        planner.build_centralized_reshard_plan(_Module(), _Module(), config["num_experts"])
    seconds, memory = time.perf_counter() - start, rss_bytes()[1] - before
    shapes = [{meta.name: meta for meta in metadata} for metadata in held]
    sends = [plan.send_ops for plan in collectives.plans[: source.world]]
    egress = [
        sum(_elements(op.my_slice, shapes[rank][op.param_name].shape) for op in ops) * 2
        for rank, ops in enumerate(sends)
    ]
    return Planned(
        seconds=seconds,
        memory_bytes=memory,
        operations=sum(map(len, sends)),
        operations_busiest=max(map(len, sends)),
        bytes=sum(egress),
        egress_max_over_mean=max(egress) / (sum(egress) / len(egress)),
    )


class _Collectives:
    """Stands for torch.distributed on rank 0 of a world that is not there."""

    def __init__(self, world: int, gathered: Sequence[list[Any]]) -> None:
        self._world, self._gathered = world, iter(gathered)
        self.plans: list[Any] = []

    def get_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return self._world

    def all_gather_object(self, out: list[Any], mine: list[Any]) -> None:
        out[:] = next(self._gathered)

    def keep(self, plans: list[Any], src: int) -> None:
        self.plans = plans


class _Module(torch.nn.Module):
    """A module without parameters: all metadata come from `_Collectives`."""

    pg_collection = object()


def _planner() -> tuple[Any, Any]:
    try:
        planner, utils = (importlib.import_module(name) for name in _MODULES)
    except ImportError as error:
        found = megatron_version()
        raise ConfigError(f"megatron-core {found} has no resharding planner as 0.16.1 ({error}): {_INSTALL}") from error
    return planner, utils


def _metadata(utils: Any, config: Mapping[str, Any], sizes: Sizes, rank: int, first_rank: int) -> list[Any]:
    """What a rank would send to all others."""
    tp, dp, pp = rank % sizes.tp, rank // sizes.tp % sizes.dp, rank // (sizes.tp * sizes.dp)
    expert_dp = sizes.tp * sizes.dp // (sizes.etp * sizes.ep)
    begin = first_rank + pp * sizes.tp * sizes.dp
    stage = range(begin, begin + sizes.tp * sizes.dp)
    tensor, data = list(stage[dp * sizes.tp : (dp + 1) * sizes.tp]), list(stage[tp :: sizes.tp])
    place = rank % (sizes.etp * sizes.ep * expert_dp)
    etp, block = place % sizes.etp, place // (sizes.etp * sizes.ep) * sizes.etp * sizes.ep
    expert_tensor = list(stage[place - etp : place - etp + sizes.etp])
    expert = list(stage[block + etp : block + sizes.etp * sizes.ep : sizes.etp])
    layers = config["num_hidden_layers"] // sizes.pp
    prefixes = {f"decoder.layers.{n}": f"decoder.layers.{pp * layers + n}" for n in range(layers)}
    made = []
    for parameter in _parameters(config, sizes, layers, pp):
        meta = utils.ParameterMetadata(
            parameter.name, parameter.shape, torch.bfloat16, 2, parameter.dim is not None, parameter.dim or 0,
            parameter.stride, parameter.expert, config["num_experts"], first_rank + rank,
            (expert_tensor if parameter.expert else tensor) if parameter.dim is not None else None,
            expert if parameter.expert else None, data, None,
        )  # fmt: skip
        utils.assign_resolved_name_inplace(meta, layer_module_prefix_map=prefixes)
        made.append(meta)
    return made


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    shape: tuple[int, ...]
    """On one rank."""
    dim: int | None = None
    """The axis that tensor parallelism divides."""
    stride: int = 1
    """2 where gate and up are divided each by itself."""
    expert: bool = False


def _parameters(config: Mapping[str, Any], sizes: Sizes, layers: int, stage: int) -> Iterator[_Parameter]:
    """Of one rank of a Qwen3-MoE with grouped experts (`models/gpt/gpt_layer_specs.py`, Transformer Engine's names)."""
    hidden, head, width = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    queries, groups = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    multiple = _VOCABULARY_MULTIPLE * sizes.tp
    vocabulary = math.ceil(config["vocab_size"] / multiple) * multiple // sizes.tp
    if stage == 0:
        yield _Parameter("embedding.word_embeddings.weight", (vocabulary, hidden), 0)
    for n in range(layers):
        layer = f"decoder.layers.{n}"
        yield _Parameter(f"{layer}.self_attention.linear_proj.weight", (hidden, queries // sizes.tp), 1)
        yield _Parameter(f"{layer}.self_attention.linear_qkv.weight", ((queries + 2 * groups) // sizes.tp, hidden), 0)
        for name, size in (("linear_qkv.layer_norm", hidden), ("q_layernorm", head), ("k_layernorm", head)):
            end = "_weight" if name.endswith("norm") and "." in name else ".weight"
            yield _Parameter(f"{layer}.self_attention.{name}{end}", (size,))
        yield _Parameter(f"{layer}.pre_mlp_layernorm.weight", (hidden,))
        yield _Parameter(f"{layer}.mlp.router.weight", (config["num_experts"], hidden))
        for e in range(config["num_experts"] // sizes.ep):
            experts = f"{layer}.mlp.experts"
            yield _Parameter(f"{experts}.linear_fc1.weight{e}", (2 * width // sizes.etp, hidden), 0, 2, expert=True)
            yield _Parameter(f"{experts}.linear_fc2.weight{e}", (hidden, width // sizes.etp), 1, expert=True)
    if stage == sizes.pp - 1:
        yield _Parameter("decoder.final_layernorm.weight", (hidden,))
        yield _Parameter("output_layer.weight", (vocabulary, hidden), 0)


def _elements(slices: Sequence[slice], shape: Sequence[int]) -> int:
    return math.prod(len(range(*each.indices(size))) for each, size in zip(slices, shape, strict=True))
