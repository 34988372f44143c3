"""Reading a live module: what this rank holds of each tensor, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from weft.errors import LayoutError
from weft.layout import ITEM_BYTES, Layout
from weft.names import NameMap
from weft.streams import settle
from weft_dtensor.flat import flat_shards, settle_flat
from weft_dtensor.naming import default_names
from weft_dtensor.pieces import FlatRange, LocalTensor, layout_of
from weft_dtensor.shards import held_ranges
from weft_dtensor.upstream import TRANSIENT, local_part, named_tensors, settle_shards, transient_names, unwrapped


@dataclass(frozen=True, slots=True)
class Inspection:
    """One rank's live module as weft sees it."""

    module: nn.Module
    layout: Layout
    memory: Mapping[str, torch.Tensor]
    """Dense one-dimensional views of local memory, by buffer name."""

    def settle(self) -> None:
        """Finish what the module or its device has under way, and check that memory is where it was.

        Raises `LayoutError` with every FSDP module that is not sharded, or every tensor that has moved.
        """
        settle_shards(self.module)
        settle_flat(self.module)
        flat, _, shown = flat_shards(self.module)
        now = {
            name: local_part(tensor)[0].data_ptr()
            for name, tensor in named_tensors(self.module)
            if id(tensor) not in shown
        }
        now |= {shard.name: shard.memory.data_ptr() for shard in flat}
        faults = [
            f"{name}: moved since it was inspected; make the source or target after wrapping, casting or loading"
            for name, memory in self.memory.items()
            if now.get(name) != memory.data_ptr()
        ]
        if faults:
            raise LayoutError(faults)
        settle({memory.device for memory in self.memory.values()})


def inspect_module(module: nn.Module, names: NameMap | None, *, written: bool) -> Inspection:
    """Find every parameter and persistent buffer of this rank, as a layout and its memory.

    `written` says that the memory will be written to: then no two tensors may share it, and none may have gaps. A
    parameter object with several names is one buffer and ties. Raises `LayoutError` with every fault.
    """
    module = unwrapped(module)
    settle_shards(module)
    settle_flat(module)
    flat, ties, shown = flat_shards(module)
    found: dict[str, LocalTensor | FlatRange] = {}
    memory: dict[str, torch.Tensor] = {}
    first: dict[int, str] = {}
    faults: list[str] = []
    for shard in flat:
        dtype = str(shard.memory.dtype).removeprefix("torch.")
        found[shard.name] = FlatRange(shard.name, shard.shape, dtype, shard.start, shard.memory.numel())
        if shard.memory.numel():
            memory[shard.name] = shard.memory
    for name, tensor in named_tensors(module):
        if id(tensor) in shown:
            continue
        if name in found or name in ties:
            faults.append(f"{name}: two tensors have this name once the prefixes of wrappers are taken off")
        elif id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            try:
                found[name], local = _inspect(name, tensor, written=written)
            except LayoutError as error:
                faults += [fault if fault.startswith(name) else f"{name}: {fault}" for fault in error.faults]
                continue
            if found[name].span:
                memory[name] = local.as_strided((found[name].span,), (1,))
    if written:
        faults += _shared(memory)
    if faults:
        raise LayoutError(faults)
    if names is None:
        shapes = {name: tensor.shape for name, tensor in found.items()}
        shapes |= {alias: shapes[name] for alias, name in ties.items()}
        names = default_names(shapes, getattr(module, "config", None))
    skipped = [(name, TRANSIENT) for name in transient_names(module)]
    layout = layout_of(list(found.values()), names, ties, skipped)
    kept = {buffer.name for buffer in layout.buffers}
    return Inspection(module, layout, {name: each for name, each in memory.items() if name in kept})


def _inspect(name: str, tensor: torch.Tensor, *, written: bool) -> tuple[LocalTensor, torch.Tensor]:
    local, splits = local_part(tensor)
    dtype = str(local.dtype).removeprefix("torch.")
    faults = []
    if type(local.data) is not torch.Tensor or local.layout is not torch.strided:
        faults.append(f"{name}: a {type(local).__name__} with layout {local.layout}, expected a plain dense tensor")
    if dtype not in ITEM_BYTES:
        faults.append(f"{name}: dtype {dtype} is none of {', '.join(ITEM_BYTES)}")
    if local.is_meta:
        faults.append(f"{name}: on the meta device; materialise the module first (to_empty, then load or initialise)")
    if faults:
        raise LayoutError(faults)
    held = LocalTensor(name, tuple(tensor.shape), dtype, held_ranges(tensor.shape, splits), tuple(local.stride()))
    if held.sizes != tuple(local.shape) and not (held.span == 0 == local.numel()):
        faults.append(f"{name}: local shape {tuple(local.shape)}, its placements say {held.sizes} of {held.shape}")
    elif held.span:
        faults += _stride_faults(held, written=written)
    if faults:
        raise LayoutError(faults)
    return held, local


def _stride_faults(held: LocalTensor, *, written: bool) -> Iterator[str]:
    """What local memory must not be like: elements on top of each other and, where it is written, gaps."""
    reach = numel = 1
    for step, size in sorted((step, size) for step, size in zip(held.strides, held.sizes, strict=True) if size > 1):
        if step < reach:
            yield f"{held.name}: strides {held.strides} put several of its elements in one place; make it contiguous"
            return
        reach += step * (size - 1)
        numel *= size
    if written and numel != held.span:
        yield f"{held.name}: strides {held.strides} leave gaps, a target must be dense: make it contiguous"


def _shared(memory: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Pairs of tensors whose memory overlaps although they are different objects."""
    begins = sorted((each.data_ptr(), each.nbytes, name) for name, each in memory.items())
    for (start, nbytes, name), (following, _, other) in pairwise(begins):
        if following < start + nbytes:
            yield f"{name} and {other} share memory but are different tensors: tie them as one parameter object"
