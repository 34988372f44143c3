"""Everything weft knows about the insides of torch: placements, FSDP's states, wrappers. Only `flat` looks there too.

Facts are from torch 2.13: `distributed/tensor/placement_types.py` (Shard, _StridedShard), `distributed/fsdp/
_fully_shard/` (_fsdp_param_group.py: states and pending gathers; _fsdp_param.py: padded shards), `nn/modules/module.py`
(`_non_persistent_buffers_set`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from weft.errors import LayoutError
from weft_dtensor.shards import Split

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What `torch.compile`, activation checkpointing and FSDP put into names."""
TRANSIENT = "non-persistent buffer: recomputed, in no checkpoint"
"""Why such buffers are skipped."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel`; others as they are."""
    return unwrapped(module.module) if isinstance(module, DistributedDataParallel) else module


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it (trap 13)."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer by plain name, in module order; tied ones under each of their names."""
    transient = set(transient_names(module))
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if plain_name(name) not in transient:
            yield plain_name(name), tensor


def transient_names(module: nn.Module) -> Iterator[str]:
    """Plain names of buffers that are in no checkpoint."""
    for prefix, each in module.named_modules(remove_duplicate=False):
        for name in sorted(each._non_persistent_buffers_set):
            if each._buffers.get(name) is not None:
                yield plain_name(f"{prefix}.{name}" if prefix else name)


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[Split, ...]]:
    """This rank's memory of a tensor, and how it was cut out of the whole. Never communicates.

    Raises `LayoutError` for a pending reduction (`Partial`), a placement weft does not know, and a rank that is not in
    the tensor's mesh.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), ()
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise LayoutError([f"this rank is not in its mesh {tensor.device_mesh}; leave the module out on this rank"])
    splits = []
    for dimension, placement in enumerate(tensor.placements):
        size, index = tensor.device_mesh.size(dimension), int(coordinate[dimension])
        if isinstance(placement, _StridedShard):
            splits.append(Split(placement.dim % tensor.ndim, size, index, int(placement.split_factor)))
        elif isinstance(placement, Shard):
            splits.append(Split(placement.dim % tensor.ndim, size, index))
        elif not isinstance(placement, Replicate):
            raise LayoutError([f"placement {placement} on mesh dimension {dimension}; redistribute it to Shard first"])
    with torch.no_grad():
        return tensor.to_local(), tuple(splits)


def settle_shards(module: nn.Module) -> None:
    """Finish pending all-gathers of FSDP and put the sharded parameters back.

    Local, but where an all-gather is pending it waits for it, so call it on every rank. Raises `LayoutError` that
    names every FSDP module that is inside its forward or backward pass, or does not leave its unsharded state.
    """
    sharded = [
        (plain_name(name) or "the root module", each, _groups(each))
        for name, each in module.named_modules()
        if isinstance(each, FSDPModule)
    ]
    busy = [
        f"FSDP parameters of {name} are in use ({group._training_state.name.lower()}): call this between steps, not "
        "inside forward or backward"
        for name, _, groups in sharded
        for group in groups
        if group._training_state.name != "IDLE"
    ]
    if busy:
        raise LayoutError(busy)
    for _, each, groups in sharded:
        if any(group._all_gather_result is not None for group in groups):
            each.unshard()  # already under way: this waits for it
        each.reshard()
    faults = [
        f"FSDP parameters of {name} are {group._sharded_state.name.lower()} after reshard(), expected sharded"
        for name, _, groups in sharded
        for group in groups
        if not group.is_sharded
    ]
    if faults:
        raise LayoutError(faults)


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # before torch 2.12
