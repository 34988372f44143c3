"""A vLLM plug-in for tests: data-parallel engines that share experts, on CPU. Put this folder on `PYTHONPATH` of
whatever starts them.

vLLM (0.31 and 0.32) picks an all-gather and a reduce-scatter of unequal parts to bring tokens to their experts and
back, and its communicator for CPU (`distributed/device_communicators/cpu_communicator.py`) has neither: such engines
start, then fail at their first request. Here they are made of gloo's collectives of equal parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch.nn.functional import pad
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def register() -> None:
    """Entry point of group `vllm.general_plugins`: called in every process, in some of them more than once."""
    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The rows of all ranks, of which rank `n` has `sizes[n]`."""
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, each, dim, sizes) for each in input_]
    counts = sizes or [len(input_)] * self.world_size
    mine = pad(input_, (0, 0) * (input_.ndim - 1) + (0, max(counts) - len(input_)))
    parts = [torch.empty_like(mine) for _ in counts]
    torch.distributed.all_gather(parts, mine, group=self.device_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None) -> torch.Tensor:
    """This rank's rows of the sum over all ranks."""
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes or len(total) // self.world_size)[self.rank_in_group]
