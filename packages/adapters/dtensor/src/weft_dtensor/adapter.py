"""Layouts of FSDP2 and HSDP ranks from a Hugging Face config and mesh sizes alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.errors import ConfigError, NotSupportedError, PluginError
from weft.layout import Layout
from weft.names import NameMap
from weft.verification import Request, Verification
from weft_dtensor.checkpoint import CheckpointSource
from weft_dtensor.naming import default_names
from weft_dtensor.pieces import LocalTensor, layout_of, row_major_strides
from weft_dtensor.shards import Split, held_ranges
from weft_dtensor.upstream import named_tensors, transient_names
from weft_dtensor.verification import load_and_verify

AXES = ("replicate", "fsdp", "tp")
"""Size of the mesh dimension that replicates (HSDP), of the one that shards (FSDP2), and of tensor parallelism."""


@dataclass(frozen=True, slots=True)
class DTensorAdapter:
    """The analytic side of weft-dtensor (`weft.contracts.Adapter`): Transformers models under `fully_shard`.

    The mesh is (replicate, fsdp), row-major in the rank; every parameter is sharded on its first dimension. Needs
    Transformers for the model's tensors; no weights are made.
    """

    axes: tuple[str, ...] = AXES

    def world_size(self, parallel: Mapping[str, int]) -> int:
        """Number of ranks, `replicate·fsdp`. Raises `ConfigError` with every unknown axis and size below 1, and
        `NotSupportedError` for `tp` above 1.
        """
        faults = [f"unknown axis {name!r}, expected {', '.join(AXES)}" for name in parallel if name not in AXES]
        faults += [f"{name}={size}, expected at least 1" for name, size in parallel.items() if size < 1]
        if faults:
            raise ConfigError(f"mesh sizes: {'; '.join(faults)}")
        if parallel.get("tp", 1) > 1:
            raise NotSupportedError(
                f"tp={parallel['tp']}: tensor-parallel plans are the caller's own, so they are read from a live module "
                "(ModuleSource) and not from a config"
            )
        return parallel.get("replicate", 1) * parallel.get("fsdp", 1)

    def replicas(self, parallel: Mapping[str, int]) -> int:
        """One: all ranks of the mesh run in lock step, so all of them serve one version."""
        self.world_size(parallel)
        return 1

    def layouts(self, config: Mapping[str, Any], parallel: Mapping[str, int], dtype: str) -> Sequence[Layout]:
        """The layout of every rank in rank order; the replicas of a shard share one object.

        `config` is a Hugging Face config, `dtype` the dtype of floating-point parameters. Raises `ConfigError` for a
        config that Transformers refuses, `PluginError` where Transformers is missing, and what `world_size` raises.
        """
        world, size = self.world_size(parallel), parallel.get("fsdp", 1)
        model = _meta_model(config)
        names = default_names({name: tuple(tensor.shape) for name, tensor in named_tensors(model)}, config)
        shards = [_layout(model, names, dtype, index, size) for index in range(size)]
        return [shards[rank % size] for rank in range(world)]

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
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(config["model_type"], **described)
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"Transformers makes no causal language model of this config: {error}") from error
    return model


def _layout(model: nn.Module, names: NameMap, dtype: str, index: int, size: int) -> Layout:
    parameters = {id(parameter) for parameter in model.parameters()}
    first: dict[int, str] = {}
    held: list[LocalTensor] = []
    ties: dict[str, str] = {}
    for name, tensor in named_tensors(model):
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
            continue
        splits = [Split(0, size, index)] if id(tensor) in parameters else []
        ranges = held_ranges(tensor.shape, splits)
        own = dtype if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        local = tuple(sum(stop - start for start, stop in each) for each in ranges)
        held.append(LocalTensor(name, tuple(tensor.shape), own, ranges, row_major_strides(local)))
    skipped = [(name, "non-persistent buffer: recomputed, in no checkpoint") for name in transient_names(model)]
    return layout_of(held, names, ties, skipped)
