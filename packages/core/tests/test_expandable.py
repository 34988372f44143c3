"""Memory of expandable segments, in snapshots as torch gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft import expandable
from weft.expandable import CudaSegments, in_expandable_segments

pytestmark = pytest.mark.trap(30)
MIB = 1 << 20


def segment(address: int, nbytes: int, expandable: bool) -> dict[str, Any]:
    """As in `torch.cuda.memory_snapshot()`, blocks and traces left out."""
    return {"device": 0, "address": address, "total_size": nbytes, "is_expandable": expandable, "blocks": []}


SEGMENTS = [
    segment(0x7F0000000000, 20 * MIB, True),
    segment(0x7F0010000000, 64 * MIB, False),
    segment(0x7F0020000000, 2 * MIB, True),
]


def test_ranges_in_expandable_segments_are_named_and_no_others() -> None:
    ranges = {
        "inside": (0x7F0000000000 + MIB, MIB),
        "its last byte": (0x7F0000000000 + 20 * MIB - 1, 1),
        "just behind": (0x7F0000000000 + 20 * MIB, 100),
        "just before": (0x7F0020000000 - 100, 100),
        "classic": (0x7F0010000000, 64 * MIB),
        "of another library": (0x6F0000000000, MIB),
        "around": (0x7F0020000000 - MIB, 4 * MIB),
        "first byte": (0x7F0020000000 - 7, 8),
    }
    assert in_expandable_segments(ranges, SEGMENTS) == ["around", "first byte", "inside", "its last byte"]
    assert in_expandable_segments(ranges, ()) == []
    assert in_expandable_segments(ranges, [{"address": 0, "total_size": 1 << 48}]) == []


def test_segments_are_read_again_when_there_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"allocated": 3, "freed": 0}
    read: list[int] = []

    def snapshot() -> list[dict[str, Any]]:
        read.append(made["allocated"])
        return SEGMENTS[: len(read)]

    cuda = SimpleNamespace(
        get_allocator_backend=lambda: "native",
        memory_stats_as_nested_dict=lambda device: {"reserved_bytes": {"all": made}},
        memory_snapshot=snapshot,
    )
    monkeypatch.setattr(expandable, "torch", SimpleNamespace(cuda=cuda))
    segments, device = CudaSegments(), torch.device("cuda:0")
    assert [len(segments.around(device)) for _ in range(3)] == [1, 1, 1]
    made["allocated"] += 1
    assert len(segments.around(device)) == 2
    made["freed"] += 1
    assert len(segments.around(device)) == 3
    assert len(segments.around(torch.device("cuda:1"))) == 3
    assert read == [3, 4, 4, 4]
    assert segments.around(torch.device("cpu")) == ()
    cuda.get_allocator_backend = lambda: "cudaMallocAsync"
    assert segments.around(device) == ()
