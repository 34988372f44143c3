"""Ordering with CUDA streams: nothing leaves before it has been written, nothing counts before it has arrived.

On CPU all of this is already so. Unproven on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from weft.contracts import Event


@dataclass(frozen=True, slots=True)
class Finished:
    """The event of work that is already done: `weft.contracts.Event` on CPU."""

    def query(self) -> bool:
        """True."""
        return True

    def synchronize(self) -> None:
        """Return at once."""


def written(tensors: Iterable[torch.Tensor]) -> Event | None:
    """An event after all that the current streams still do to these tensors; None when all are on CPU (trap 37)."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    if not devices:
        return None
    if len(devices) > 1:
        settle(devices)
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(devices.pop()))
    return event


def settle(devices: Iterable[torch.device]) -> None:
    """Wait until everything that was asked of these devices is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
