"""CUDA memory between processes of one host, by IPC handles. Has never run on a GPU.

The handles are torch's: `torch.multiprocessing.reductions` makes and opens them, as it does for tensors in queues, so
torch's allocator knows that others use its segments. Each export is for one process, which is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import msgspec
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from weft.contracts import Event
from weft.errors import TransportError
from weft.member import Region


class Exported(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A handle of CUDA memory, for one process."""

    gpu: str
    """The device's UUID: its number may differ between processes."""
    storage_handle: bytes
    storage_size: int
    storage_offset: int
    tensor_offset: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    event_sync: bool


def export(region: Region) -> Exported:
    """A handle of the region for one more process. Raises `TransportError` for memory that CUDA does not export."""
    try:
        _, arguments = reduce_tensor(region.memory)
    except RuntimeError as error:
        words = str(error).partition("\n")[0]
        raise TransportError(f"region {region.name!r} on {region.device} cannot be exported: {words}") from error
    _, _, _, tensor_offset, _, _, _, handle, size, offset, _, counter, counter_offset, event, event_sync = arguments
    gpu = str(torch.cuda.get_device_properties(region.device).uuid)
    return Exported(gpu, handle, size, offset, tensor_offset, counter, counter_offset, event, event_sync)


def open_exported(peer: str, nbytes: int, exported: Exported) -> torch.Tensor:
    """A peer's CUDA region in this process, one-dimensional uint8. Raises `TransportError` with the reason."""
    count = torch.cuda.device_count()
    numbers = {str(torch.cuda.get_device_properties(index).uuid): index for index in range(count)}
    if exported.gpu not in numbers:
        raise TransportError(
            f"memory of {peer} is on GPU {exported.gpu}, this process sees {', '.join(numbers) or 'none'}: let it see "
            "that one too (CUDA_VISIBLE_DEVICES)"
        )
    try:
        memory: torch.Tensor = rebuild_cuda_tensor(
            torch.Tensor, (nbytes,), (1,), exported.tensor_offset, torch.UntypedStorage, torch.uint8,
            numbers[exported.gpu], exported.storage_handle, exported.storage_size, exported.storage_offset, False,
            exported.counter_handle, exported.counter_offset, exported.event_handle, exported.event_sync,
        )  # fmt: skip
    except RuntimeError as error:
        words = str(error).partition("\n")[0]
        raise TransportError(f"memory of {peer} on GPU {exported.gpu} cannot be opened: {words}") from error
    return memory


class Streams:
    """A stream of the transport's own per thread and device."""

    def __init__(self) -> None:
        self._local = threading.local()

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> None:
        """Copy each first tensor to the second on `device`'s stream, and wait until the bytes are in place."""
        streams: dict[torch.device, torch.cuda.Stream] = self._local.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        stream = streams[device]
        with torch.cuda.stream(stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        stream.synchronize()


def reached(device: torch.device) -> Event | None:
    """An event behind what the caller's current stream still does there; None for the CPU."""
    if device.type == "cpu":
        return None
    event: Event = torch.cuda.current_stream(device).record_event()
    return event
