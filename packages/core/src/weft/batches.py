"""How a bucket is divided into batches: bounded groups of operations that both ends issue in lock-step (trap 36).

Both ends compute it from the lengths of the segments and equal limits, so that it is the same at both (trap 42).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from weft.contracts import Bucket
from weft.errors import ConfigError
from weft.member import Region


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a batch may be."""

    batch_bytes: int
    """Most bytes of a batch."""
    operations: int
    """Most operations of a batch: one per direct part, one for all packed parts together."""
    pack_below_bytes: int
    """Segments shorter than this are packed into the batch's staging buffer."""
    staging_bytes: int
    """Size of that buffer, and most packed bytes of a batch."""

    def __post_init__(self) -> None:
        if not 1 <= self.staging_bytes <= self.batch_bytes or self.operations < 1:
            raise ConfigError(
                f"batches of {self.batch_bytes} bytes and {self.operations} operations with {self.staging_bytes} bytes "
                "of staging: staging must be 1 byte at least and batch_bytes at most, and operations 1 at least"
            )


class Part(NamedTuple):
    """A piece of a segment."""

    segment: int
    """Row of the bucket's segments."""
    start: int
    """First byte, from the segment's own."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Division:
    """What one batch holds."""

    packed: tuple[Part, ...]
    """Travel together, in order, through staging."""
    direct: tuple[Part, ...]
    """Travel straight from and to their memory, one operation each."""


def divide(lengths: Sequence[int], limits: Limits) -> tuple[Division, ...]:
    """The batches of segments of these lengths in bytes, in order. Empty segments are in none.

    A segment is cut only where it is longer than a batch, or than staging when it is packed.
    """
    divisions: list[Division] = []
    packed: list[Part] = []
    direct: list[Part] = []
    packed_bytes = direct_bytes = 0
    for segment, nbytes in enumerate(lengths):
        small = nbytes < limits.pack_below_bytes
        longest = limits.staging_bytes if small else limits.batch_bytes
        for start in range(0, nbytes, longest):
            part = Part(segment, start, min(longest, nbytes - start))
            full = packed_bytes + direct_bytes + part.nbytes > limits.batch_bytes
            full |= small and packed_bytes + part.nbytes > limits.staging_bytes
            operations = len(direct) + (not small) + bool(packed or small)
            if (packed or direct) and (full or operations > limits.operations):
                divisions.append(Division(tuple(packed), tuple(direct)))
                packed, direct, packed_bytes, direct_bytes = [], [], 0, 0
            if small:
                packed.append(part)
                packed_bytes += part.nbytes
            else:
                direct.append(part)
                direct_bytes += part.nbytes
    if packed or direct:
        divisions.append(Division(tuple(packed), tuple(direct)))
    return tuple(divisions)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Batch:
    """A `Division` as views of registered memory, uint8."""

    packed: tuple[torch.Tensor, ...]
    direct: tuple[torch.Tensor, ...]

    @property
    def packed_bytes(self) -> int:
        """Length of what goes through staging."""
        return sum(piece.numel() for piece in self.packed)

    def gather(self, staging: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copy the packed pieces into staging; all that is to be sent, in order."""
        out = self.through(staging)
        if self.packed:
            torch.cat(self.packed, out=out[0])
        return out

    def through(self, staging: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All that is to be received, in order."""
        return (staging[: self.packed_bytes], *self.direct) if self.packed else self.direct

    def scatter(self, staging: torch.Tensor) -> None:
        """Copy what arrived in staging to the packed pieces."""
        at = 0
        for piece in self.packed:
            piece.copy_(staging[at : at + piece.numel()])
            at += piece.numel()


def batches_of(bucket: Bucket, regions: Sequence[Region], limits: Limits) -> tuple[Batch, ...]:
    """A bucket's batches, in order."""
    segments = bucket.segments.tolist()

    def view(part: Part) -> torch.Tensor:
        region, offset, *_ = segments[part.segment]
        piece: torch.Tensor = regions[region].memory[offset + part.start :][: part.nbytes]
        return piece

    return tuple(
        Batch(tuple(map(view, each.packed)), tuple(map(view, each.direct)))
        for each in divide(bucket.segments["nbytes"].tolist(), limits)
    )
