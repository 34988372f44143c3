"""What the demo needs inside vLLM's workers, as named methods: dump parameters, damage one byte, count what a refit
does.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from vllm._custom_ops import cpu_prepack_moe_weight

from weft_cli.demo.observe import Observer

_EXACT = 1 << 24
"""Whole numbers below this are exact in float32."""


class DemoWorker:
    """Mixed into vLLM's worker class by `worker_extension_cls`; the worker has `model_runner` and `rank`."""

    model_runner: Any
    rank: int

    def demo_observe(self) -> None:
        """Wrap what is to be counted; before the transport starts."""
        self._demo_observer = Observer()
        self._demo_observer.tell_apart(self.model_runner.model)

    def demo_start_counting(self) -> None:
        """Count registrations and allocations from here."""
        self._demo_observer.start()

    def demo_stop_counting(self) -> dict[str, int]:
        """What was counted since."""
        return self._demo_observer.stop()

    def demo_dump(self, directory: str) -> str:
        """Write every parameter of this rank, as it is in memory, to a safetensors file; returns its path. Experts,
        which vLLM has packed, are put in order again.
        """
        path = f"{directory}/engine-{self.rank}.safetensors"
        model, found = self.model_runner.model, {}
        for name, parameter in model.named_parameters():
            data = parameter.detach().contiguous().clone()
            module = model.get_submodule(name.rpartition(".")[0])
            found[name] = _unpacked(data, module) if data.ndim == 3 else data
        save_file(found, path)
        return path

    def demo_flip_byte(self) -> str:
        """Invert one byte in the middle of one parameter of rank 0; returns the parameter's name there, and ""
        elsewhere.
        """
        if self.rank != 0:
            return ""
        name, parameter = max(self.model_runner.model.named_parameters(), key=lambda item: item[1].numel())
        data = parameter.detach().view(-1).view(torch.uint8)
        middle = data.numel() // 2
        data[middle] = data[middle] ^ 0xFF
        return str(name)


def _unpacked(packed: torch.Tensor, module: Any) -> torch.Tensor:
    """The weights of a layer's experts as they were before vLLM packed them: packing moves whole elements, so packing
    their numbers says where each went.
    """
    if packed.dtype is not torch.float32 or packed.numel() > _EXACT:
        raise ValueError(f"{packed.dtype}{tuple(packed.shape)}: only {_EXACT} numbers of float32 can tell their places")
    numbers = torch.arange(packed.numel(), dtype=packed.dtype).view(packed.shape)
    places = cpu_prepack_moe_weight(numbers, module.quant_method.moe_kernel.fused_experts.isa).flatten().long()
    unpacked = torch.empty_like(packed)
    unpacked.view(-1)[places] = packed.view(-1)
    return unpacked
