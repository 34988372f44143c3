"""What the demo needs inside vLLM's workers, as named methods: dump parameters, damage one byte, count what a refit
does.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from weft_cli.demo.observe import Observer


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
        """Write every parameter of this rank, as it is in memory, to a safetensors file; returns its path."""
        path = f"{directory}/engine-{self.rank}.safetensors"
        parameters = self.model_runner.model.named_parameters()
        save_file({name: parameter.detach().contiguous().clone() for name, parameter in parameters}, path)
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
