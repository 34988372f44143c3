"""Members: the processes that take part, and the tag that every message between them carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One process taking part. What planning reads is stable over restarts; the rest says whom exactly one talks to."""

    name: str
    """Unique in the job and stable over restarts, such as `trainer/3` or `rollout0/1`."""
    source_layout: str | None
    """Address of the layout it sends from, or None."""
    target_layout: str | None
    """Address of the layout it receives into, or None."""
    replica: str | None
    """Name of the replica a target belongs to."""
    replica_size: int
    """How many members that replica has."""
    host: str
    """Identity of the machine; equal hosts share memory."""
    domain: str
    """Fabric domain (such as an NVLink domain); equal to `host` where there is none."""
    device: str
    """Such as `cpu` or `cuda:3`."""
    nics: tuple[str, ...] = ()
    """Network interfaces it may use; empty lets the transport choose."""
    incarnation: int = 0
    """Grows with every restart of the process behind `name`."""
    memory_epoch: int = 0
    """Grows whenever addresses or what lies behind them change (sleep and wake, reload)."""

    @property
    def is_source(self) -> bool:
        """Whether it sends weights."""
        return self.source_layout is not None

    @property
    def sends_from(self) -> str | None:
        """Address of the layout of what it sends: its source's or, where it is none and passes on, its target's."""
        return self.source_layout if self.is_source else self.target_layout

    @property
    def is_target(self) -> bool:
        """Whether it receives weights."""
        return self.target_layout is not None


class Tag(msgspec.Struct, frozen=True, array_like=True):
    """On every message: which refit, and which life of the sender, it belongs to."""

    version: int
    sender: str
    incarnation: int
    memory_epoch: int


@dataclass(frozen=True, slots=True)
class Region:
    """Memory to be registered with a transport: one per allocation, not per tensor."""

    name: str
    memory: torch.Tensor
    """One-dimensional uint8 tensor over the whole allocation. Whoever made the region keeps it alive until it is
    deregistered.
    """

    @property
    def address(self) -> int:
        """First byte, as an integer."""
        return self.memory.data_ptr()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.memory.numel()

    @property
    def device(self) -> torch.device:
        """Where the memory lives."""
        return self.memory.device


class RemoteRegion(msgspec.Struct, frozen=True, array_like=True):
    """A peer's region as its endpoint record tells it."""

    address: int
    nbytes: int
    device: str


def regions_of(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Region]:
    """One region per distinct storage behind named tensors, in order of first appearance (traps 29 and 31).

    Every tensor lies inside exactly one of the regions, at `tensor.data_ptr() - region.address`. A region has the name
    of its first tensor, and says how many others it has.
    """
    memories: dict[int, torch.Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            address = storage.data_ptr()
            if address not in memories:
                memories[address] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            names.setdefault(address, []).append(name)
    labels = {at: found[0] + (f" and {len(found) - 1} more" if found[1:] else "") for at, found in names.items()}
    return [Region(labels[address], memory) for address, memory in memories.items()]
