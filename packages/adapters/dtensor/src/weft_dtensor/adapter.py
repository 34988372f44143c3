"""Layouts of ranks of a Transformers model under FSDP2, HSDP, tensor and expert parallelism, from a Hugging Face config
and mesh sizes alone.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.errors import ConfigError, LayoutError, PluginError
from weft.layout import Layout
from weft.verification import Request, Verification
from weft_dtensor.checkpoint import CheckpointSource
from weft_dtensor.mesh import AXES, Mesh, Place
from weft_dtensor.naming import default_names
from weft_dtensor.pieces import LocalTensor, layout_of, row_major_strides
from weft_dtensor.plans import Cuts
from weft_dtensor.shards import held_ranges
from weft_dtensor.upstream import TRANSIENT, named_tensors, transient_names
from weft_dtensor.verification import load_and_verify


def dtensor_layout(
    hf_config: Mapping[str, Any], parallel: Mapping[str, int], rank: int, dtype: str = "bfloat16"
) -> Layout:
    """The layout of one rank, with floating-point parameters in `dtype`.

    `parallel` has the axes of `DTensorAdapter`. Raises `ConfigError` for a rank that is not there, and what
    `DTensorAdapter.layouts` raises.
    """
    mesh = Mesh.read(parallel)
    if not 0 <= rank < mesh.world:
        raise ConfigError(f"rank {rank} of a mesh of {mesh.world}: it has ranks 0 to {mesh.world - 1}")
    return _Shards(hf_config, mesh, dtype).layout(mesh.place(rank))


@dataclass(frozen=True, slots=True)
class DTensorAdapter:
    """The analytic side of weft-dtensor (`weft.contracts.Adapter`): Transformers models as its own plans of tensor and
    expert parallelism cut them, under `fully_shard`.

    The mesh is (replicate, fsdp, tp), row-major in the rank; FSDP shards every parameter on its first dimension. `ep`
    divides the same ranks again, for experts (`weft_dtensor.mesh.Mesh`). Needs Transformers for the model's tensors and
    plans; no weights are made.
    """

    axes: tuple[str, ...] = AXES

    def world_size(self, parallel: Mapping[str, int]) -> int:
        """Number of ranks, `replicate·fsdp·tp`. Raises `ConfigError` with every unknown axis and size below 1, or for
        an `ep` that does not factor.
        """
        return Mesh.read(parallel).world

    def replicas(self, parallel: Mapping[str, int]) -> int:
        """One: all ranks of the mesh run in lock step, so all of them serve one version."""
        self.world_size(parallel)
        return 1

    def layouts(self, config: Mapping[str, Any], parallel: Mapping[str, int], dtype: str) -> Sequence[Layout]:
        """The layout of every rank in rank order; the replicas of a shard share one object.

        `config` is a Hugging Face config, `dtype` the dtype of floating-point parameters. Raises `ConfigError` for a
        config that Transformers refuses and for sizes that its plans cannot divide, `NotSupportedError` for a model
        without a plan, `PluginError` where Transformers is missing, `LayoutError` with every tensor whose lengths do
        not divide so that torch's placements contradict what FSDP does.
        """
        mesh = Mesh.read(parallel)
        shards = _Shards(config, mesh, dtype)
        places = [mesh.place(rank) for rank in range(mesh.world)]
        made = {place: shards.layout(place) for place in dict.fromkeys(places)}
        return [made[place] for place in places]

    def checkpoint(self, path: str | os.PathLike[str]) -> CheckpointSource:
        """A checkpoint on disk, whole: for packages that must not import this one. Raises `ConfigError`."""
        return CheckpointSource(path)

    def verify(self, request: Request, report: Callable[[str], None]) -> Verification:
        """Implements `weft.verification.Verifier`: `weft verify module`. Raises what `load_and_verify` raises."""
        return load_and_verify(request, report)


def _meta_model(config: Mapping[str, Any]) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise PluginError(
            f"layouts from a config need Transformers ({error}): pip install 'weft-dtensor[transformers]'"
        ) from error
    described = {name: value for name, value in config.items() if name != "model_type"}
    try:
        made = transformers.AutoConfig.for_model(config["model_type"], **described)
        sees = hasattr(made, "vision_config")
        maker = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            model: nn.Module = maker.from_config(made)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"Transformers makes no language model of this config: {error}") from error
    return model


class _Shards:
    """The ranks of one model over one mesh."""

    def __init__(self, config: Mapping[str, Any], mesh: Mesh, dtype: str) -> None:
        self._dtype = dtype
        self._model = _meta_model(config)
        self._cuts = Cuts.of(self._model, mesh)
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(self._model)}
        self._names = default_names(shapes, config)

    def layout(self, place: Place) -> Layout:
        first: dict[int, str] = {}
        held: list[LocalTensor] = []
        ties: dict[str, str] = {}
        faults: list[str] = []
        for name, tensor in named_tensors(self._model):
            if first.setdefault(id(tensor), name) != name:
                ties[name] = first[id(tensor)]
                continue
            try:
                held.append(self._held(name, tensor, place))
            except LayoutError as error:
                faults += [f"{name}: {fault}" for fault in error.faults]
        if faults:
            raise LayoutError(faults)
        skipped = [(name, TRANSIENT) for name in transient_names(self._model)]
        return layout_of(held, self._names, ties, skipped)

    def _held(self, name: str, tensor: torch.Tensor, place: Place) -> LocalTensor:
        owner = self._model.get_submodule(name.rpartition(".")[0])
        splits = self._cuts.splits(name, tensor, owner, place) if isinstance(tensor, nn.Parameter) else []
        ranges = held_ranges(tensor.shape, splits)
        dtype = self._dtype if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        local = tuple(sum(stop - start for start, stop in each) for each in ranges)
        return LocalTensor(name, tuple(tensor.shape), dtype, ranges, row_major_strides(local))
