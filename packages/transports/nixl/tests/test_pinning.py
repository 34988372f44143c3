"""CUDA memory that RDMA cannot pin."""

from __future__ import annotations

import pytest
import torch

from weft.deadline import Deadline
from weft.errors import ConfigError
from weft.expandable import CudaSegments
from weft.member import Member, Region
from weft_nixl import factory


@pytest.mark.trap(30)
def test_the_transport_refuses_the_region_by_name_and_takes_others(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    segments = [
        {"address": bad.data_ptr() - 16, "total_size": 128, "is_expandable": True},
        {"address": good.data_ptr(), "total_size": 64, "is_expandable": False},
    ]
    monkeypatch.setattr(CudaSegments, "around", lambda self, device: segments)
    transport = factory({})
    transport.open(Member("a", None, None, None, 0, "here", "here", "cpu"))
    transport.register(Region("model.norm.weight", good), Deadline.after(30))
    with pytest.raises(
        ConfigError, match=r"'model.up.weight and 3 more' \(64 bytes on cpu\).*weft_cudamalloc\.pool\(\)"
    ):
        transport.register(Region("model.up.weight and 3 more", bad), Deadline.after(30))
    transport.close()
