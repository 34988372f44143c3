"""CUDA memory of expandable segments is refused, by name, before it is registered (trap 30).

An address range of theirs is many allocations, which come and go. RDMA registers it without an error and fails at the
first write; CUDA's handles for other processes name one allocation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from weft.errors import ConfigError
from weft.member import Region

Segments = Sequence[Mapping[str, Any]]
"""`torch.cuda.memory_snapshot()`: of each segment `address`, `total_size` in bytes, `is_expandable`, among others."""


def in_expandable_segments(ranges: Mapping[str, tuple[int, int]], segments: Segments) -> list[str]:
    """Names of the ranges, each (address, bytes), of which any byte is in an expandable segment; sorted.

    Addresses are unique over all devices. A range in no segment at all is not torch's, and is left alone.
    """
    expandable = [(each["address"], each["total_size"]) for each in segments if each.get("is_expandable")]
    return sorted(
        name
        for name, (address, nbytes) in ranges.items()
        if any(address < begin + size and begin < address + nbytes for begin, size in expandable)
    )


def refuse_expandable(region: Region, segments: Segments, what_cannot: str) -> None:
    """Raise `ConfigError` for a region that is in an expandable segment, which `what_cannot`: `RDMA cannot pin`."""
    if in_expandable_segments({region.name: (region.address, region.nbytes)}, segments):
        raise ConfigError(
            f"region {region.name!r} ({region.nbytes} bytes on {region.device}) is in an expandable segment of torch's "
            f"allocator, which {what_cannot}: allocate it within `with weft_cudamalloc.pool():` (pip install "
            "weft-cudamalloc), or turn expandable_segments off in PYTORCH_CUDA_ALLOC_CONF"
        )


class CudaSegments:
    """Torch's segments, read again only when there are others: it takes milliseconds, and regions come in hundreds."""

    def __init__(self) -> None:
        self._counts: tuple[torch.device, int, int] | None = None
        self._segments: Segments = ()

    def around(self, device: torch.device) -> Segments:
        """All segments of this process; none for memory that is not CUDA's, or not of torch's own allocator."""
        if device.type != "cuda" or torch.cuda.get_allocator_backend() != "native":
            return ()
        made = torch.cuda.memory_stats_as_nested_dict(device)["reserved_bytes"]["all"]
        counts = device, int(made["allocated"]), int(made["freed"])
        if counts != self._counts:
            self._counts, self._segments = counts, torch.cuda.memory_snapshot()
        return self._segments
