"""What the engine's kernels keep beside parameters, held in place while a module is processed again.

Two kinds, as in vLLM 0.32. A CPU linear is a callable, `module.cpu_linear`, with the packed weight in its closure
(`model_executor/layers/utils.py`). Experts have a kernel object, `method.moe_kernel`
(`layers/fused_moe/fused_moe_method_base.py`); while it is there, processing takes itself for an update and leaves out
what it does only at load, such as packing on CPU, so it is put aside first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType
from typing import Any

import torch

from weft.errors import NotSupportedError
from weft_vllm.compat import CPUDNNLGEMMHandler

_EXPERT_STATE = ("moe_kernel", "moe_quant_config")


@contextmanager
def kept_in_place(module: Any, method: Any) -> Iterator[None]:
    """Let `method` process `module` as after loading, in the body; the kernel objects that were there stay, with the
    new weights in them, because compiled code holds them.

    Raises `NotSupportedError` when the engine chose another kernel than at load.
    """
    linear = getattr(module, "cpu_linear", None)
    experts = {name: getattr(method, name) for name in _EXPERT_STATE if hasattr(method, name)}
    try:
        for name in experts:
            setattr(method, name, None)
        yield
        _renew_linear(module, linear, getattr(module, "cpu_linear", None))
        _renew_experts(module, experts, {name: getattr(method, name) for name in experts})
    finally:
        if linear is not None:
            module.cpu_linear = linear
        for name, value in experts.items():
            setattr(method, name, value)


def _renew_linear(module: Any, old: Callable[..., Any] | None, new: Callable[..., Any] | None) -> None:
    """Move freshly packed weights into the memory and native handles that `old` has."""
    if old is None or new is None or new is old:
        return
    old_cells, new_cells = _cells(old), _cells(new)
    if old_cells.keys() != new_cells.keys() or getattr(old, "__code__", None) is not getattr(new, "__code__", None):
        raise NotSupportedError(f"{type(module).__name__}: post-processing chose another CPU kernel than at load")
    for name, cell in old_cells.items():
        kept, fresh = cell.cell_contents, new_cells[name].cell_contents
        if isinstance(kept, torch.Tensor):
            kept.copy_(fresh)
        elif isinstance(kept, CPUDNNLGEMMHandler):
            _swap(kept.handler_tensor, fresh.handler_tensor)
        elif kept != fresh:
            raise NotSupportedError(
                f"{type(module).__name__}: the CPU kernel's {name} changed from {kept!r} to {fresh!r}"
            )


def _swap(kept: Any, fresh: Any) -> None:
    """Exchange the addresses of two native handlers, so that the fresh object frees the old one."""
    address = kept.clone()
    kept.copy_(fresh)
    fresh.copy_(address)


def _cells(function: Callable[..., Any]) -> dict[str, CellType]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return dict(zip(names, getattr(function, "__closure__", None) or (), strict=True))


def _renew_experts(module: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Copy the tensors that the new kernel object holds (scales, biases) into those of the old one."""
    kept, fresh = _expert_tensors(old), _expert_tensors(new)
    was, now = (_describe(state, tensors) for state, tensors in ((old, kept), (new, fresh)))
    if was != now:
        raise NotSupportedError(f"{type(module).__name__}: post-processing made {now}, the engine holds {was}")
    for name, tensor in kept.items():
        tensor.copy_(fresh[name])


def _expert_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that the kernel object of a layer's experts and its description of quantization hold, by name."""
    holders = {"fused_experts": getattr(state.get("moe_kernel"), "fused_experts", None)}
    holders |= getattr(state.get("moe_quant_config"), "__dict__", {})
    return {
        f"{holder}.{name}": value
        for holder, held in holders.items()
        for name, value in getattr(held, "__dict__", {}).items()
        if isinstance(value, torch.Tensor)
    }


def _describe(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Which experts these are, and what they hold."""
    kind = type(getattr(state.get("moe_kernel"), "fused_experts", None)).__name__
    return " ".join([kind, *(f"{name} {t.dtype}{tuple(t.shape)}" for name, t in sorted(tensors.items()))])
