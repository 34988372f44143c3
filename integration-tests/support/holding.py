"""What a process holds, by measures that do not depend on when an allocator or a collector gives memory back."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Holding:
    """At one moment."""

    allocated_bytes: int
    """Given out by malloc, in all arenas and mappings, and not given back; with what only a collector would find."""
    objects: int
    """Small blocks of Python, which are not malloc's; without what only a collector would find."""
    descriptors: int
    resident_bytes: int
    """Moves with the allocator: to look at only."""


def holding() -> Holding:
    """Of this process."""
    allocated = allocated_bytes()
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Holding(
        allocated, sys.getallocatedblocks(), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")
    )


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def allocated_bytes() -> int:
    """`Holding.allocated_bytes`. Needs glibc 2.33."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallocInfo
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)
