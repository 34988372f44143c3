"""Which GPUs are made to see what arrived, without a GPU."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weft.contracts import Bucket, TransferProgram
from weft.errors import TransportError
from weft.member import Tag
from weft.testing.crew import segments
from weft_nixl import factory, transport
from weft_nixl.transfers import NixlPrepared
from weft_nixl.visibility import flush_inbound_writes


@pytest.mark.trap(34)
def test_a_fence_flushes_every_gpu_that_a_bucket_came_to_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[torch.device] = []
    monkeypatch.setattr(transport, "flush_inbound_writes", flushed.append)
    devices = [torch.device(name) for name in ("cpu", "cuda:1", "cuda:0")]
    regions: Any = tuple(SimpleNamespace(device=device) for device in devices)
    both, first, none = ([(region, 0, 0, 0, 1) for region in chosen] for chosen in ((2, 1, 1), (2,), (0,)))
    buckets = tuple(Bucket(n, "peer", segments(rows)) for n, rows in enumerate((both, first, none)))
    prepared = NixlPrepared(TransferProgram(b"", (), buckets, regions, {}), {}, {})
    for bucket, expected in enumerate((["cuda:0", "cuda:1"], ["cuda:0"], [])):
        flushed.clear()
        factory({}).fence(prepared, bucket, Tag(1, "peer", 0, 0), None)
        assert [str(device) for device in flushed] == expected


@pytest.mark.trap(34)
def test_a_thread_that_has_not_used_cuda_yet_gets_a_context_before_the_driver_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver takes the thread's context; making a device current does not make one where it is current already."""
    done: list[str] = []
    status = {"flush": 0}

    def flush(*_: int) -> int:
        done.append("flush")
        return status["flush"]

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(query=lambda: done.append("query"))
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuFlushGPUDirectRDMAWrites=flush))
    flush_inbound_writes(torch.device("cuda", 0))
    assert done == ["query", "flush"]
    status["flush"] = 201
    with pytest.raises(TransportError, match="cuda:0 failed with CUresult 201"):
        flush_inbound_writes(torch.device("cuda", 0))
