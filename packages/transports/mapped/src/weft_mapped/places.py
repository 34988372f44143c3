"""How a region of one process is reached from another: what its owner finds out, and what a sender makes of it.

Memory behind a file that is still open or still has a name (POSIX shared memory, memfd, what torch shares) is mapped;
CUDA memory is opened by its IPC handle; everything else is written by `process_vm_writev`.
"""

from __future__ import annotations

import bisect
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from weft.errors import PeerLostError
from weft.member import Region
from weft_mapped.cuda import Exported, export
from weft_mapped.kernel import Life, write_error


class Private(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Only its own process maps it."""


class Shared(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Part of a file."""

    descriptor: int
    """Of the file, in the owner's process."""
    offset: int
    """Of the region, in bytes."""
    file: tuple[int, int]
    """Its device and inode, by which it is known again."""


How = Private | Shared | Exported


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A region as its owner tells a peer."""

    serial: int
    """Of its registration, unique in the life of the endpoint."""
    address: int
    nbytes: int
    device: str
    how: How


class SharedMemory(msgspec.Struct, frozen=True):
    """A range of this process that maps a file."""

    start: int
    stop: int
    offset: int
    inode: int
    path: str


def shared_memory(maps: str) -> list[SharedMemory]:
    """Of the text of `/proc/PID/maps` (proc(5)), what is writable, shared, and of a file; by address."""
    found = []
    for line in maps.splitlines():
        span, permissions, offset, _, inode, *path = line.split(maxsplit=5)
        if permissions.startswith("rw") and permissions.endswith("s") and int(inode):
            start, stop = (int(end, 16) for end in span.split("-"))
            found.append(SharedMemory(start, stop, int(offset, 16), int(inode), path[0] if path else ""))
    return found


class Owner:
    """Says how this process's own regions are reached. Keeps the files of shared ones open."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, str], tuple[int, tuple[int, int]] | None] = {}

    def describe(self, regions: Sequence[Region]) -> list[Private | Shared]:
        """Of each region of CPU memory. Reads the process's map once."""
        ranges = shared_memory(Path("/proc/self/maps").read_text())
        starts = [each.start for each in ranges]
        return [self._describe(region, ranges, starts) for region in regions]

    def place(self, region: Region, place: Place) -> Place:
        """The region's place as one more peer needs it: each gets its own handle of CUDA memory."""
        return msgspec.structs.replace(place, how=export(region)) if region.device.type == "cuda" else place

    def close(self) -> None:
        """Let go of the files."""
        for found in self._files.values():
            if found is not None:
                os.close(found[0])
        self._files.clear()

    def _describe(self, region: Region, ranges: Sequence[SharedMemory], starts: Sequence[int]) -> Private | Shared:
        at = bisect.bisect_right(starts, region.address) - 1
        if at < 0 or region.address + region.nbytes > ranges[at].stop:
            return Private()
        around = ranges[at]
        key = around.inode, around.path
        if key not in self._files:
            self._files[key] = _opened(around)
        found = self._files[key]
        return Private() if found is None else Shared(found[0], around.offset + region.address - around.start, found[1])


def _opened(memory: SharedMemory) -> tuple[int, tuple[int, int]] | None:
    """A descriptor of its file, and what the file is known by; None where it has no name and is not open any more."""
    candidates = [memory.path, *(f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))]
    for path in candidates:
        try:
            if os.stat(path).st_ino == memory.inode and os.path.realpath(path) == os.path.realpath(memory.path):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                status = os.fstat(descriptor)
                return descriptor, (status.st_dev, status.st_ino)
        except OSError:  # not there (any more), or not to be written
            continue
    return None


def map_shared(life: Life, place: Place, how: Shared) -> torch.Tensor:
    """A peer's shared region in this process, one-dimensional uint8. Raises `PeerLostError` or `TransportError`."""
    path = f"/proc/{life.pid}/fd/{how.descriptor}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise write_error(error, life.peer, f"opening {path}") from error
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != how.file:
            raise PeerLostError(life.peer, f"{path} is another file than its shared memory: its endpoint has closed")
        skipped = how.offset % mmap.ALLOCATIONGRANULARITY
        whole = mmap.mmap(descriptor, skipped + place.nbytes, offset=how.offset - skipped)
    finally:
        os.close(descriptor)
    return torch.from_numpy(np.frombuffer(whole, np.uint8)[skipped:])


def summary(places: Iterable[Place]) -> str:
    """How many regions are reached in which way, in words."""
    ways = {Private: "written by process_vm_writev", Shared: "mapped", Exported: "opened by CUDA IPC"}
    kinds = [type(place.how) for place in places]
    return ", ".join(f"{kinds.count(kind)} {words}" for kind, words in ways.items() if kind in kinds)
