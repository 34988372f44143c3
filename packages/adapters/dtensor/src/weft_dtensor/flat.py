"""Everything weft knows about torch's first FSDP: parameters as ranges of flat ones. No other module looks there.

Facts are from torch 2.13, `distributed/fsdp/_flat_param.py`: `FlatParameter` (`_param_infos`, `_shard_param_infos`,
`_shared_param_infos`), and `FlatParamHandle` (states, resharding, parameters that were given other memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from weft.errors import LayoutError
from weft_dtensor.upstream import plain_name


@dataclass(frozen=True, slots=True)
class FlatShard:
    """This rank's part of one parameter: a range of its elements in row-major order, which may be empty."""

    name: str
    """As `named_parameters` of the module without FSDP gives it, apart from other wrappers' prefixes."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """The first of its elements that is held here."""
    memory: torch.Tensor
    """[elements held], a view of this rank's flat parameter."""


def flat_shards(module: nn.Module) -> tuple[list[FlatShard], dict[str, str], set[int]]:
    """What this rank holds of every parameter that is part of a flat one; ties, as alias to name; and the identities
    of the tensors that `named_parameters` shows instead. Call `settle_flat` first.

    Raises `LayoutError` with every parameter that was not contiguous or not a plain tensor when it was wrapped.
    """
    shards: list[FlatShard] = []
    ties: dict[str, str] = {}
    shown: set[int] = set()
    faults: list[str] = []
    for prefix, handle in _handles(module):
        flat: Any = handle.flat_param
        memory = flat.detach()
        shown |= {id(each) for each in (flat, *(flat._params or ()), *(flat._shared_params or ()))}
        described = zip(
            flat._fqns, flat._shapes, flat._shard_param_infos, flat._contiguities, flat._param_extensions, strict=True
        )
        for inner, shape, held, contiguous, extension in described:
            name = plain_name(prefix + inner)
            if not contiguous:
                faults.append(f"{name}: was not contiguous when FSDP flattened it; make it contiguous before wrapping")
            if extension is not None:
                faults.append(f"{name}: was a DTensor when FSDP flattened it; use fully_shard over tensor parallelism")
            start, first, count = (
                (held.intra_param_start_idx, held.offset_in_shard, held.numel_in_shard) if held.in_shard else (0, 0, 0)
            )
            shards.append(FlatShard(name, tuple(shape), start, memory[first : first + count]))
        for info in flat._shared_param_infos:
            alias = _joined(prefix, info.module_name, info.param_name)
            ties[alias] = _joined(prefix, info.prim_module_name, info.prim_param_name)
    if faults:
        raise LayoutError(faults)
    return shards, ties, shown


def settle_flat(module: nn.Module) -> None:
    """Put the shards of flat parameters back, and drop gathered ones: they would outlive a refit of the shards.

    Local. Raises `LayoutError` that names every FSDP module that is inside its forward or backward pass, or whose
    parameters were given memory of another shape.
    """
    handles = [(plain_name(prefix).rstrip(".") or "the root module", handle) for prefix, handle in _handles(module)]
    faults = [
        f"FSDP parameters of {name} are in use ({handle._training_state.name.lower()}): call this between steps, not "
        "inside forward or backward"
        for name, handle in handles
        if handle._training_state.name != "IDLE"
    ]
    if faults:
        raise LayoutError(faults)
    for name, handle in handles:
        try:
            _settle_one(handle)
        except RuntimeError as error:
            faults.append(f"FSDP parameters of {name}: {error}")
    if faults:
        raise LayoutError(faults)


def _settle_one(handle: Any) -> None:
    if handle._use_orig_params:
        handle._writeback_orig_params()  # what FSDP itself does before it uses parameters that were given other memory
    if hasattr(handle.flat_param, "_local_shard"):  # it has run, and may have left the gathered parameter allocated
        handle.reshard(handle.uses_sharded_strategy)
        handle.post_reshard()
        handle._prefetched = False


def _joined(prefix: str, module: str, parameter: str) -> str:
    return plain_name(prefix + (f"{module}.{parameter}" if module else parameter))


def _handles(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(prefix of its parameters' names, handle) of every flat parameter, those of outer modules first."""
    for name, each in module.named_modules():
        if isinstance(each, FullyShardedDataParallel) and each._handle is not None:
            yield f"{name}." if name else "", each._handle
