"""The layout of a live vLLM rank: its parameters as its own weight loading fills them.

Every parameter and persistent buffer becomes one weft buffer, named as in the vLLM model. It is `live` when post-load
processing left it where loading wrote it, and `scratch` when loading's tensor is gone (packed, permuted, requantized):
then a group lands in scratch and `weft_vllm.landing` has the engine turn it into kernel format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from weft.box import Affine
from weft.builder import LayoutBuilder
from weft.errors import LayoutError, NotSupportedError
from weft.layout import Kind, Layout, LogicalTensor
from weft_vllm import compat
from weft_vllm.overlay import Placed, overlay
from weft_vllm.parameters import LOADER
from weft_vllm.recorder import record
from weft_vllm.recording import Read, SlotRecord, dense_numel

PRE, POST = "pre", "post"
"""Groups of what comes before and after the stack of layers."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter or persistent buffer that loading fills."""

    name: str
    """The first of its names in the model."""
    group: str
    live: torch.Tensor
    """The engine's tensor, as it is after post-load processing."""
    loaded: torch.Tensor
    """Its stand-in as loading sees it: on the meta device, with weight loader and other attributes."""
    kind: Kind


@dataclass(frozen=True, slots=True)
class RecordedLayout:
    """A rank's layout and what it was made from."""

    layout: Layout
    slots: Mapping[str, Slot]
    """By buffer name."""
    loader_landed: tuple[str, ...]
    """Checkpoint tensors that land whole and go through the engine's loader, because it does more than copy them."""
    derived: Mapping[str, str]
    """Why, by parameter."""


def record_layout(model: Any, tensors: Sequence[LogicalTensor], *, scratch_slots: int = 2) -> RecordedLayout:
    """Record the model's weight loading and describe this rank.

    `tensors` are the checkpoint's (`weft_vllm.checkpoint`). The live model is not touched: for the time of the
    recording its modules hold stand-ins instead of their parameters, so no forward pass may run meanwhile. Raises
    `LayoutError` naming every element range that nothing fills, `NotSupportedError` for loading that can neither be
    expressed nor repeated, and `LoadRecordingError` when the model's loading cannot be recorded.
    """
    slots, skipped, ties = _slots(model)
    with _standing_in(model, {id(slot.live): slot.loaded for slot in slots}):
        records = record(model.load_weights, tensors, {slot.name: slot.loaded for slot in slots})
    shapes = {tensor.name: tensor for tensor in tensors}
    builder = LayoutBuilder(scratch_slots=scratch_slots)
    faults: list[str] = []
    by_loader: dict[str, str] = {}
    for slot in slots:
        entry = records[slot.name]
        if entry.derived:
            by_loader.update(_land_by_loader(slot, slots, records))
    for slot in slots:
        if not records[slot.name].inputs and slot.name.rpartition(".")[2] in compat.DEFAULTED_BUFFERS:
            skipped.append((slot.name, "the engine sets its default when the checkpoint has none"))
        elif slot.name not in by_loader:
            faults += _describe(builder, slot, records[slot.name], shapes)
        for name in sorted(records[slot.name].inputs) if slot.name in by_loader else ():
            builder.tensor(name, shapes[name].shape, shapes[name].dtype)
            builder.buffer(LOADER + name, shapes[name].dtype, shapes[name].numel, group=slot.group, kind=Kind.SCRATCH)
            builder.shard(name, LOADER + name)
    if faults:
        raise LayoutError(faults)
    known = {name for entry in records.values() for name in entry.inputs}
    group_of = {slot.name: slot.group for slot in slots}
    for alias, name in ties.items():
        # shared within one layer it is the engine's wiring, such as a router that the experts hold too, and no tie
        if name in known and alias not in known and not alias.startswith(f"{group_of[name]}."):
            builder.tie(alias, name)
    for name, reason in sorted(skipped):
        builder.skip(name, reason)
    landed = sorted({name for slot in by_loader for name in records[slot].inputs})
    described = {slot.name: slot for slot in slots}
    return RecordedLayout(builder.build(), described, tuple(landed), by_loader)


def _slots(model: torch.nn.Module) -> tuple[list[Slot], list[tuple[str, str]], dict[str, str]]:
    """The model's slots in group order, what is left out and why, and further names of shared parameters."""
    remembered = compat.at_load(model)
    persistent = set(model.state_dict(keep_vars=True))
    skipped: list[tuple[str, str]] = []
    ties: dict[str, str] = {}
    found: dict[int, tuple[str, torch.Tensor]] = {}
    faults: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in remembered:
            first, _ = found.setdefault(id(parameter), (name, parameter))
            if first != name:
                ties[name] = first
        elif compat.is_attention(model.get_submodule(name.rpartition(".")[0])):
            skipped.append((name, "made by the attention layer's post-load processing, which every landing runs again"))
        else:
            faults.append(f"{name}: added by post-load processing; weft does not know how to renew it")
    held = {
        name
        for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    }
    faults += [f"{name}: removed by post-load processing" for name in remembered if name not in held]
    if faults:
        raise LayoutError(faults)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in persistent:
            skipped.append((name, "not persistent: computed from the config, no checkpoint holds it"))
        elif name not in remembered:
            skipped.append((name, "made by post-load processing"))
        else:
            found.setdefault(id(buffer), (name, buffer))
    groups = _group_names([name for name, _ in found.values()])
    slots = []
    for (name, live), group in zip(found.values(), groups, strict=True):
        loaded = remembered[name]
        same = (live.shape, live.dtype, live.stride(), live.data_ptr()) == (
            loaded.stand_in.shape, loaded.stand_in.dtype, loaded.stand_in.stride(), loaded.address,
        )  # fmt: skip
        kind = Kind.LIVE if same else Kind.SCRATCH
        slots.append(Slot(name, group, live, compat.meta_like(loaded.stand_in), kind))
    order = {group: n for n, group in enumerate(dict.fromkeys([PRE, *groups]))}
    slots.sort(key=lambda slot: (slot.group == POST, order[slot.group]))
    return slots, skipped, ties


def _group_names(names: Sequence[str]) -> list[str]:
    """Per name its group: the path up to its first number (one decoder layer), else `pre` or `post` of the numbered
    ones.
    """
    groups = []
    seen = False
    for name in names:
        parts = name.split(".")
        number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            groups.append(POST if seen else PRE)
        else:
            seen = True
            groups.append(".".join(parts[: number + 1]))
    return groups


@contextmanager
def _standing_in(model: torch.nn.Module, stand_ins: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Let modules hold stand-ins (by identity of the tensor they replace) instead of their tensors."""
    tables: list[dict[str, Any]] = [t for module in model.modules() for t in (module._parameters, module._buffers)]
    held = [(table, name, tensor) for table in tables for name, tensor in table.items() if id(tensor) in stand_ins]
    try:
        for table, name, tensor in held:
            table[name] = stand_ins[id(tensor)]
        yield
    finally:
        for table, name, tensor in held:
            table[name] = tensor


def _land_by_loader(slot: Slot, slots: Sequence[Slot], records: Mapping[str, SlotRecord]) -> dict[str, str]:
    """The slots that the loader must fill because one of them is derived, with the reason."""
    reason = "; ".join(dict.fromkeys(records[slot.name].derived))
    inputs = records[slot.name].inputs
    if not inputs:
        raise NotSupportedError(
            f"{slot.name}: loading writes values into it that come from no checkpoint tensor ({reason})"
        )
    fed = [other for other in slots if records[other.name].inputs & inputs]
    packed = [other.name for other in fed if other.kind is not Kind.LIVE]
    if packed:
        raise NotSupportedError(
            f"{slot.name}: loading does more than copy ({reason}), and the engine repacks "
            f"{', '.join(packed)} afterwards; both at once are not supported"
        )
    beyond = {name for other in fed for name in records[other.name].inputs} - inputs
    if beyond:
        raise NotSupportedError(
            f"{slot.name}: loading mixes {', '.join(sorted(inputs))} with {', '.join(sorted(beyond))} ({reason})"
        )
    return {other.name: reason for other in fed}


def _describe(builder: LayoutBuilder, slot: Slot, entry: SlotRecord, shapes: Mapping[str, LogicalTensor]) -> list[str]:
    """Add one slot's buffer, pieces and fills; returns faults."""
    numel = dense_numel(slot.loaded.shape, slot.loaded.stride())
    if numel is None:
        return [
            f"{slot.name}: its memory has holes or repeats: shape {tuple(slot.loaded.shape)}, "
            f"strides {slot.loaded.stride()}"
        ]
    if numel == 0:
        return [f"{slot.name}: has no elements, although the model holds it"]
    dtype = str(slot.loaded.dtype).removeprefix("torch.")
    placed, holes = overlay(numel, entry.writes)
    if not entry.writes:
        return [f"{slot.name}: no checkpoint tensor is loaded into it"]
    builder.buffer(slot.name, dtype, numel, group=slot.group, kind=slot.kind)
    add_placed(builder, slot.name, dtype, placed, shapes)
    return [f"{slot.name}: {_count(hole)} elements from {hole.offset} on are never written" for hole in holes]


def add_placed(
    builder: LayoutBuilder, buffer: str, dtype: str, placed: Sequence[Placed], shapes: Mapping[str, LogicalTensor]
) -> None:
    """Declare what lies in a buffer: pieces in memory order, each tensor with the dtype it has here, then fills."""
    for part in placed:
        if isinstance(part.value, Read):
            builder.tensor(part.value.tensor, shapes[part.value.tensor].shape, dtype)
            if shapes[part.value.tensor].shape == ():
                builder.shard(part.value.tensor, buffer, offset=part.memory.offset)
            else:
                builder.view(part.value.tensor, part.value.view, buffer, part.memory)
        else:
            builder.fill(buffer, part.memory.offset, *_merged(part.memory), part.value)


def _merged(view: Affine) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a view, as one run where it is dense."""
    numel = _count(view)
    if dense_numel(view.sizes, view.strides) == numel:
        return (numel,), (1,)
    kept = [(size, stride) for size, stride in zip(view.sizes, view.strides, strict=True) if size != 1]
    return tuple(size for size, _ in kept), tuple(stride for _, stride in kept)


def _count(view: Affine) -> int:
    return math.prod(view.sizes)
