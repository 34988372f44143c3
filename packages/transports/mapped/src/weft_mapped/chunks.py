"""Buckets as copies of a bounded size, each in the way in which its peer's memory is reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from weft.contracts import Bucket, TransferProgram
from weft.errors import ConfigError, TransportError
from weft_mapped.cuda import Streams, open_exported
from weft_mapped.gate import Pass
from weft_mapped.kernel import IOVEC, MOST_IOVECS, Life, copy_memory, write_error, write_memory
from weft_mapped.places import Place, Private, Shared, map_shared

Rows = npt.NDArray[np.void]
"""Of dtype `weft.contracts.SEGMENT`."""


@dataclass(slots=True, eq=False)
class Reach:
    """Another process's memory, as this one reaches it."""

    life: Life
    gate: Pass
    streams: Streams
    probed: bool = False
    memories: dict[int, torch.Tensor] = field(default_factory=dict)
    """What this process maps of it, by serial."""

    def memory(self, place: Place) -> torch.Tensor | None:
        """The region in this process; None where it can only be written from outside, which is tried once.

        Raises `TransportError` that says why neither is possible.
        """
        if isinstance(place.how, Private):
            if not self.probed:
                self.gate.probe()
                self.probed = True
            return None
        if place.serial not in self.memories:
            self.memories[place.serial] = (
                map_shared(self.life, place, place.how)
                if isinstance(place.how, Shared)
                else open_exported(self.life.peer, place.nbytes, place.how)
            )
        return self.memories[place.serial]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """One copy."""

    reach: Reach
    serials: tuple[int, ...]
    """Regions of the peer that it writes."""
    nbytes: int

    def move(self) -> bool:
        """Make it; False where the receiver is just taking something back, so that it must be tried again.

        Raises `TransportError`.
        """
        with self.reach.gate.entered(self.serials) as entered:
            if entered:
                self.copy()
        return entered

    def copy(self) -> None:
        """Move the bytes."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Addressed(Chunk):
    """Between addresses of CPU memory."""

    local: npt.NDArray[np.void]
    """Here, of dtype `IOVEC`."""
    remote: npt.NDArray[np.void]
    """In the peer's process or, where it is mapped, in this one."""
    mapped: bool

    def copy(self) -> None:
        """See `Chunk.copy`."""
        if self.mapped:
            copy_memory(self.local, self.remote)
            return
        life = self.reach.life
        what = f"writing {self.nbytes} bytes into process {life.pid}"
        try:
            written = write_memory(life.pid, self.local, self.remote)
        except OSError as error:
            raise write_error(error, life.peer, what) from error
        if written != self.nbytes:
            raise TransportError(f"{what} (peer {life.peer}) ended after {written}: its memory is gone, or read-only")


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice(Chunk):
    """Where either end is CUDA memory."""

    device: torch.device
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """From, to."""

    def copy(self) -> None:
        """See `Chunk.copy`. The bytes are in place when it returns."""
        try:
            self.reach.streams.copy(self.pairs, self.device)
        except RuntimeError as error:
            words = str(error).partition("\n")[0]
            raise TransportError(f"copying {self.nbytes} bytes to {self.reach.life.peer}: {words}") from error


def chunks_of(
    bucket: Bucket, program: TransferProgram, places: Mapping[int, Place], reach: Reach, chunk_bytes: int
) -> list[Chunk]:
    """The bucket's copies; `places` are the peer's regions that segments name, by their index."""
    rows = bucket.segments[bucket.segments["nbytes"] > 0]
    memories: dict[int, torch.Tensor | None] = {
        index: reach.memory(places[index]) for index in np.unique(rows["remote_region"]).tolist()
    }
    ways: dict[str, list[int]] = {}
    for index, memory in memories.items():
        way = "private" if memory is None else "mapped" if memory.device.type == "cpu" else "device"
        ways.setdefault(way, []).append(index)
    chunks: list[Chunk] = []
    on_cpu = np.array([region.device.type == "cpu" for region in program.regions], bool)
    for way, indices in ways.items():
        mine = rows[np.isin(rows["remote_region"], indices)]
        addressed = on_cpu[mine["region"]] if way != "device" else np.zeros(len(mine), bool)
        if way == "private" and not addressed.all():
            raise ConfigError(
                f"bucket {bucket.index} goes from CUDA memory to private memory of {bucket.peer}: let that be shared "
                "(torch.Tensor.share_memory_) or on a GPU, or use transport nixl"
            )
        for part in divide(mine[addressed], chunk_bytes):
            chunks.append(_addressed(part, program, places, reach, memories, mapped=way == "mapped"))
        for part in divide(mine[~addressed], chunk_bytes):
            chunks.append(_on_device(part, program, places, reach, memories))
    return chunks


def divide(rows: Rows, chunk_bytes: int) -> Iterator[Rows]:
    """Segments in parts of at most so many bytes and `MOST_IOVECS`; longer segments are cut."""
    pieces = -(-rows["nbytes"] // chunk_bytes)
    cut = np.repeat(rows, pieces)
    number = np.arange(len(cut)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    for name in ("offset", "remote_offset"):
        cut[name] += number * chunk_bytes
    cut["nbytes"] = np.minimum(cut["nbytes"] - number * chunk_bytes, chunk_bytes)
    ends = np.cumsum(cut["nbytes"])
    start = 0
    while start < len(cut):
        before = ends[start] - cut["nbytes"][start]
        stop = min(int(np.searchsorted(ends, before + chunk_bytes, side="right")), start + MOST_IOVECS)
        yield cut[start:stop]
        start = stop


def _addressed(
    rows: Rows, program: TransferProgram, places: Mapping[int, Place], reach: Reach,
    memories: Mapping[int, torch.Tensor | None], *, mapped: bool,
) -> Addressed:  # fmt: skip
    there = np.zeros(max(memories) + 1, np.uint64)
    for index, memory in memories.items():
        there[index] = places[index].address if memory is None else memory.data_ptr()
    here = np.array([region.address for region in program.regions], np.uint64)
    local, remote = (
        _vector(bases[rows[region]] + rows[offset].astype(np.uint64), rows["nbytes"])
        for bases, region, offset in ((here, "region", "offset"), (there, "remote_region", "remote_offset"))
    )
    return Addressed(reach, _serials(rows, places), int(rows["nbytes"].sum()), local, remote, mapped)


def _vector(addresses: npt.NDArray[np.uint64], nbytes: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    vector = np.empty(len(addresses), IOVEC)
    vector["address"], vector["nbytes"] = addresses, nbytes
    return vector


def _on_device(
    rows: Rows, program: TransferProgram, places: Mapping[int, Place], reach: Reach,
    memories: Mapping[int, torch.Tensor | None],
) -> OnDevice:  # fmt: skip
    pairs = []
    for region, offset, remote_region, remote_offset, nbytes in rows.tolist():
        target = memories[remote_region]
        assert target is not None
        source = program.regions[region].memory[offset : offset + nbytes]
        pairs.append((source, target[remote_offset : remote_offset + nbytes]))
    source, target = pairs[0]
    device = source.device if source.device.type == "cuda" else target.device
    return OnDevice(reach, _serials(rows, places), int(rows["nbytes"].sum()), device, pairs)


def _serials(rows: Rows, places: Mapping[int, Place]) -> tuple[int, ...]:
    return tuple(places[index].serial for index in np.unique(rows["remote_region"]).tolist())
