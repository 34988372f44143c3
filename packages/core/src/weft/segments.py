"""Segments: the byte ranges of a bucket at both of its ends, now that the regions are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weft.contracts import SEGMENT
from weft.copies import Copies
from weft.lower import ALIGNMENT, LoweredBucket, run_elements
from weft.table import Int64s, ragged_ranges


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a member's buffers are: region index and byte offset in it, by buffer number."""

    region: Int64s
    offset: Int64s


Slot = tuple[int, int]
"""Region and byte offset."""


def segments(copies: Copies, itemsize: Int64s, source: Binding, target: Binding, sending: bool) -> npt.NDArray[np.void]:
    """Lower copies to segments: as few as both sides' memory allows, in the order of the target's memory.

    `itemsize` is bytes per element of every copy; see `contracts.SEGMENT`.
    """
    run = run_elements(copies)
    within = np.cumprod(copies.sizes[:, ::-1], axis=1)[:, ::-1] <= run[:, None]
    outer_sizes = np.where(within, 1, copies.sizes)
    counts = copies.numel // run
    owner, number = ragged_ranges(np.zeros(len(copies), np.int64), counts)
    from_offset, to_offset = copies.source_offset[owner], copies.target_offset[owner]
    for axis in range(outer_sizes.shape[1] - 1, -1, -1):
        number, index = np.divmod(number, outer_sizes[owner, axis])
        from_offset = from_offset + index * copies.source_strides[owner, axis]
        to_offset = to_offset + index * copies.target_strides[owner, axis]
    size = itemsize[owner]
    ends = []
    for binding, buffer, offset in (
        (source, copies.source_buffer[owner], from_offset), (target, copies.target_buffer[owner], to_offset)
    ):  # fmt: skip
        ends.append((binding.region[buffer], binding.offset[buffer] + offset * size))
    order = np.lexsort((ends[1][1], ends[1][0]))  # runs of different copies may continue each other, row by row
    ends = [(region[order], offset[order]) for region, offset in ends]
    return _joined(ends if sending else ends[::-1], (run[owner] * size)[order])


def packed_segments(
    bucket: LoweredBucket, itemsize: Int64s, source: Binding, target: Binding, slots: tuple[Slot, Slot], sending: bool
) -> npt.NDArray[np.void]:
    """Segments of a packed bucket: each copy leaves from the slot or straight from its buffer, and arrives likewise.

    `slots` are where the bucket's slot begins at the sender and at the receiver.
    """
    copies = bucket.copies
    nbytes = copies.numel * itemsize
    ends = []
    for binding, buffer, element, slot, staged in (
        (source, copies.source_buffer, copies.source_offset, slots[0], bucket.gathered),
        (target, copies.target_buffer, copies.target_offset, slots[1], bucket.scattered),
    ):
        region = np.where(staged, slot[0], binding.region[buffer])
        ends.append((region, np.where(staged, slot[1] + bucket.offsets, binding.offset[buffer] + element * itemsize)))
    # Between two slots what aligns a copy travels with it, so that neighbours are one segment.
    nbytes = np.where(bucket.gathered & bucket.scattered, -(-nbytes // ALIGNMENT) * ALIGNMENT, nbytes)
    return _joined(ends if sending else ends[::-1], nbytes)


def _joined(ends: Sequence[tuple[Int64s, Int64s]], length: Int64s) -> npt.NDArray[np.void]:
    """Segments of (region, offset) here and there and bytes; those that continue each other at both ends are one."""
    (region, offset), (remote_region, remote_offset) = ends
    joins = np.zeros(len(length), dtype=bool)
    joins[1:] = (
        (region[1:] == region[:-1]) & (remote_region[1:] == remote_region[:-1])
        & (offset[1:] == offset[:-1] + length[:-1]) & (remote_offset[1:] == remote_offset[:-1] + length[:-1])
    )  # fmt: skip
    starts = np.flatnonzero(~joins)
    result = np.zeros(len(starts), dtype=SEGMENT)
    for field, column in (
        ("region", region), ("offset", offset), ("remote_region", remote_region), ("remote_offset", remote_offset)
    ):  # fmt: skip
        result[field] = column[starts]
    if len(starts):
        result["nbytes"] = np.add.reduceat(length, starts)
    return result
