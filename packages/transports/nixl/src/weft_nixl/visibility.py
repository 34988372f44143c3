"""Making bytes that a network card wrote visible to a GPU's kernels (trap 34). Has never run on a GPU."""

from __future__ import annotations

import ctypes

import torch

from weft.errors import TransportError

_CURRENT_CONTEXT = 0
_TO_OWNER = 100
_SUCCESS = 0
_NOT_SUPPORTED = 801


def flush_inbound_writes(device: torch.device) -> None:
    """Order RDMA writes that have been notified before later work on `device`.

    `cuFlushGPUDirectRDMAWrites` (CUDA driver API); no device synchronisation does it. Devices that do not support it
    have no such writes: bytes came by a copy engine, complete before their notification. No-op for CPU memory.
    """
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).query()  # gives a new thread the context that the driver asks for
        status = ctypes.CDLL("libcuda.so.1").cuFlushGPUDirectRDMAWrites(_CURRENT_CONTEXT, _TO_OWNER)
    if status not in (_SUCCESS, _NOT_SUPPORTED):
        raise TransportError(f"cuFlushGPUDirectRDMAWrites on {device} failed with CUresult {status}")
