"""From bytes in load format to kernel format, by the engine's own post-load processing.

A group of weights has arrived: fills are set, whole tensors go through the model's loader, and every module that holds
one of the group's parameters is processed again by its quantization method, as after loading. Parameters that
processing replaced at load are put in its hands as views of the scratch memory; what comes out is copied into the
engine's own tensors and kernel objects, whose addresses never change (trap 53). Modules that only share a parameter,
such as a tied output layer with a packed copy of the embedding, are processed with it: vLLM's own reload leaves that
copy stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.errors import LayoutError
from weft.layout import Fill, Kind, Layout
from weft_vllm import compat
from weft_vllm.binding import RecordedLayout, Slot
from weft_vllm.kernels import kept_in_place
from weft_vllm.parameters import LOADER


@dataclass(frozen=True, slots=True)
class _Module:
    """A module to process again when a group has arrived, and its parameters that live in scratch until then."""

    name: str
    module: torch.nn.Module
    method: Any
    """Its quantization method; unquantized weights have one too."""
    scratch: tuple[tuple[str, Slot], ...]
    """(name in the module, slot)."""


class Landing:
    """Lands the groups of one rank. Not thread-safe; must not run beside a forward pass."""

    def __init__(
        self,
        model: Any,
        recorded: RecordedLayout,
        memory: Mapping[str, torch.Tensor],
        config: compat.VllmConfig,
    ) -> None:
        self._model = model
        self._memory = memory
        self._config = config
        layout = recorded.layout
        self._fills: list[list[Fill]] = [[] for _ in layout.groups]
        buffers = {buffer.name: buffer for buffer in layout.buffers}
        for fill in layout.fills:
            self._fills[buffers[fill.buffer].group].append(fill)
        self._whole = _whole_tensors(layout)
        self._modules = [_modules(model, recorded, group) for group in layout.groups]
        self._attention = [
            [m for name, m in model.named_modules() if compat.is_attention(m) and name.startswith(f"{group}.")]
            for group in layout.groups
        ]

    @torch.no_grad()
    def land(self, group: int) -> None:
        """Bring one group into kernel format. Raises whatever the engine's processing raises; the group is then
        undefined.
        """
        for fill in self._fills[group]:
            _view(self._memory[fill.buffer], fill.sizes, fill.strides, fill.offset).fill_(fill.value)
        whole = [(name, self._memory[LOADER + name].view(shape)) for name, shape in self._whole[group]]
        if whole:
            self._model.load_weights(iter(whole))
        with compat.configured(self._config):
            for entry in self._modules[group]:
                self._process(entry)
            for module in self._attention[group]:
                compat.finish_attention(module, self._config)

    def _process(self, entry: _Module) -> None:
        module = entry.module
        with kept_in_place(module, entry.method):
            for name, slot in entry.scratch:
                module._parameters[name] = self._in_scratch(slot)
            try:
                entry.method.process_weights_after_loading(module)
                for name, slot in entry.scratch:
                    _copy_back(f"{entry.name}.{name}", getattr(module, name), slot.live)
            finally:
                for name, slot in entry.scratch:
                    module._parameters[name] = slot.live  # type: ignore[assignment]

    def _in_scratch(self, slot: Slot) -> Any:
        """The parameter as loading would have left it, on the group's scratch memory."""
        view = _view(self._memory[slot.name], slot.loaded.shape, slot.loaded.stride(), 0)
        parameter: Any = torch.nn.Parameter(view, requires_grad=False)
        parameter.__class__ = type(slot.loaded)
        parameter.__dict__ = dict(slot.loaded.__dict__)
        return parameter


def _view(memory: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], offset: int) -> torch.Tensor:
    """A strided view of a buffer; `offset` counts from the buffer's first element, not the allocation's."""
    return memory.as_strided(tuple(sizes), tuple(strides), int(memory.storage_offset()) + offset)


def _copy_back(name: str, processed: torch.Tensor, live: torch.Tensor) -> None:
    if processed.shape != live.shape or processed.dtype != live.dtype:
        found, held = (f"{tensor.dtype}{tuple(tensor.shape)}" for tensor in (processed, live))
        raise LayoutError([f"{name}: post-processing gave {found}, the engine holds {held}"])
    live.data.copy_(processed.data)


def _whole_tensors(layout: Layout) -> list[list[tuple[str, tuple[int, ...]]]]:
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    whole: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in layout.groups]
    for buffer in layout.buffers:
        if buffer.name.startswith(LOADER):
            name = buffer.name.removeprefix(LOADER)
            whole[buffer.group].append((name, shapes[name]))
    return whole


def _modules(model: torch.nn.Module, recorded: RecordedLayout, group: str) -> Sequence[_Module]:
    """Modules that hold parameters of `group` and process them after loading."""
    slots = {id(slot.live): slot for slot in recorded.slots.values() if slot.group == group}
    found = []
    for name, module in model.named_modules():
        held = {key: slots[id(p)] for key, p in module._parameters.items() if p is not None and id(p) in slots}
        method = compat.quant_method(module)
        if held and method is not None:
            scratch = tuple((key, slot) for key, slot in held.items() if slot.kind is Kind.SCRATCH)
            found.append(_Module(name, module, method, scratch))
    orphans = {slot.name for slot in slots.values() if slot.kind is Kind.SCRATCH}
    orphans -= {slot.name for entry in found for _, slot in entry.scratch}
    if orphans:
        raise LayoutError(
            [
                f"{name}: replaced after loading, by something else than a quantization method"
                for name in sorted(orphans)
            ]
        )
    return found
