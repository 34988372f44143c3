"""The few functions of nvshmem4py and CUDA that are used. None of this has ever run on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from weft.batches import Batch
from weft.contracts import Event
from weft.errors import ConfigError, TransportError
from weft.member import Member
from weft_nvshmem.packing import table_of

INSTALL = "pip install 'weft-nvshmem[cu12]' or 'weft-nvshmem[cu13]'"
UNIQUE_ID_BYTES = 128
"""`nvshmemx_uniqueid_t`: a version and 124 bytes."""


class _CudaStream:
    """A torch stream as `cuda.core` wants it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, int(self._stream.cuda_stream)


class Library:
    """NVSHMEM and CUDA of this process: `weft_nvshmem.network.Hardware`. What they raise becomes `TransportError`."""

    def __init__(self) -> None:
        self._core: Any = None
        self._cuda: Any = None
        self._foreign: tuple[type[Exception], ...] = ()
        self._device = torch.device("cuda")
        self._kernels: Any = None
        self._tables: weakref.WeakKeyDictionary[Batch, tuple[torch.Tensor, int]] = weakref.WeakKeyDictionary()

    def start(self, member: Member) -> torch.device:
        """Import what is needed. Raises `ConfigError` that says what is missing."""
        self._device = torch.device(member.device)
        if self._device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError(
                f"transport 'nvshmem' of {member.name}: NVSHMEM moves GPU memory, this member's device is "
                f"{member.device} and torch finds {torch.cuda.device_count()} GPUs here; use transport 'gloo' or 'nixl'"
            )
        try:
            self._core = importlib.import_module("nvshmem.core")
            self._cuda = importlib.import_module("cuda.core")
            bindings = importlib.import_module("nvshmem.bindings")
        except ImportError as error:
            raise ConfigError(f"transport 'nvshmem' needs nvshmem4py: {INSTALL} ({error})") from error
        own = (self._core.NvshmemError, self._core.NvshmemInvalid, bindings.NVSHMEMError)
        self._foreign = (*own, RuntimeError)  # the last is the loader's, and torch's
        with contextlib.suppress(ImportError):  # without Triton pieces are copied one by one
            self._kernels = importlib.import_module("weft_nvshmem.kernels")
        return self._device

    @property
    def packs(self) -> str:
        """How pieces are packed, in words."""
        return "by one Triton kernel" if self._kernels else "piece by piece, since Triton does not import"

    def unique_id(self) -> bytes:
        """What all members of a new world need; made by one of them."""
        with self._translated("making a unique id"):
            return ctypes.string_at(self._core.get_unique_id().ptr, UNIQUE_ID_BYTES)

    def begin(self, unique_id: bytes, number: int, members: int) -> None:
        """Make the world. Collective; waits for all members, and cannot be interrupted."""
        with self._translated("making the world"):
            identity = self._core.get_unique_id(empty=True)
            ctypes.memmove(identity.ptr, unique_id, UNIQUE_ID_BYTES)
            torch.cuda.set_device(self._device)
            where = self._cuda.Device(torch.cuda.current_device())
            where.set_current()
            self._core.init(device=where, uid=identity, rank=number, nranks=members, initializer_method="uid")

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Symmetric memory of these sizes in bytes, uint8, zero everywhere before this returns. Collective; waits."""
        stream = torch.cuda.Stream(self._device)
        with self._translated("allocating symmetric memory"), torch.cuda.stream(stream):
            memory = [from_dlpack(self._core.buffer(size)).view(torch.uint8).zero_() for size in sizes]
            self._core.barrier_all(stream=_CudaStream(stream))
            stream.synchronize()
        return memory

    def lane(self) -> torch.cuda.Stream:
        """A stream of its own."""
        return torch.cuda.Stream(self._device)

    def copy(self, batch: Batch, slot: torch.Tensor, pack: bool, lane: torch.cuda.Stream) -> torch.Tensor:
        """Copy all pieces into the slot, or out of it; the part of it that they take."""
        (used,) = batch.through(slot)
        with self._translated("packing a batch"), torch.cuda.stream(lane):
            if self._kernels is not None:
                table, width = self._table(batch)
                self._kernels.copy(table, width, slot, pack)
            elif pack:
                batch.gather(slot)
            else:
                batch.scatter(slot)
        return used

    def put(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        counter: torch.Tensor,
        value: int,
        number: int,
        lane: torch.cuda.Stream,
    ) -> None:
        """Write `source` to the beginning of `target` of member `number`, and then `value` to its `counter`."""
        with self._translated("putting a batch"), torch.cuda.stream(lane):
            self._core.put_signal(
                self._buffer(target[: source.numel()]),
                self._buffer(source),
                self._buffer(counter),
                value,
                self._core.SignalOp.SIGNAL_SET,
                remote_pe=number,
                stream=_CudaStream(lane),
            )

    def wait(self, counter: torch.Tensor, value: int, lane: torch.cuda.Stream) -> None:
        """Let the stream go on only when this member's own counter has reached the value."""
        with self._translated("waiting for a batch"), torch.cuda.stream(lane):
            reached = self._core.ComparisonType.CMP_GE
            self._core.signal_wait(self._buffer(counter), value, reached, stream=_CudaStream(lane))

    def raise_counter(self, counter: torch.Tensor, value: int, number: int, lane: torch.cuda.Stream) -> None:
        """Write `value` to the counter of member `number`."""
        with self._translated("giving a slot back"), torch.cuda.stream(lane):
            assign = self._core.SignalOp.SIGNAL_SET
            self._core.signal_op(self._buffer(counter), value, assign, remote_pe=number, stream=_CudaStream(lane))

    def mark(self, lane: torch.cuda.Stream) -> Event:
        """An event after all that was issued to it so far."""
        event: Event = lane.record_event()
        return event

    def reached(self) -> Event:
        """An event of the caller's current stream."""
        return self.mark(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        """Free everything. Collective; waits for all members, and cannot be interrupted."""
        with self._translated("finalising"):
            self._core.finalize()

    def _table(self, batch: Batch) -> tuple[torch.Tensor, int]:
        found = self._tables.get(batch)
        if found is None:
            rows, width = table_of(batch.packed)
            found = self._tables[batch] = torch.from_numpy(rows).to(self._device), width
        return found

    def _buffer(self, memory: torch.Tensor) -> Any:
        return self._cuda.Buffer.from_handle(memory.data_ptr(), memory.numel())

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._foreign as error:
            raise TransportError(f"NVSHMEM, {what}: {error}") from error
