"""How a bucket becomes messages: long segments alone, short ones packed. The same at both ends, from lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.contracts import Bucket
from weft.member import Region


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a bucket's payload."""

    pieces: tuple[torch.Tensor, ...]
    """Views of registered memory, uint8. One goes from or to its memory directly; several are packed in order."""
    nbytes: int

    @property
    def packed(self) -> bool:
        """Whether it needs a staging buffer."""
        return len(self.pieces) > 1

    def gather(self, staging: torch.Tensor) -> torch.Tensor:
        """Copy the pieces into staging; the part that was filled."""
        at = 0
        for piece in self.pieces:
            staging[at : at + piece.numel()] = piece
            at += piece.numel()
        return staging[:at]

    def scatter(self, staging: torch.Tensor) -> None:
        """Copy what arrived in staging to the pieces."""
        at = 0
        for piece in self.pieces:
            piece.copy_(staging[at : at + piece.numel()])
            at += piece.numel()


def dropped(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages of the same sizes into memory of their own."""
    return tuple(Message((torch.empty(message.nbytes, dtype=torch.uint8),), message.nbytes) for message in messages)


def messages_of(
    bucket: Bucket, regions: Sequence[Region], pack_below_bytes: int, pack_bytes: int
) -> tuple[Message, ...]:
    """A bucket's messages in order. A packed message has at most `pack_bytes`, and ends before a long segment."""
    messages: list[Message] = []
    pieces: list[torch.Tensor] = []
    packed_bytes = 0
    for region, offset, _, _, nbytes in bucket.segments.tolist():
        if nbytes == 0:
            continue
        alone = nbytes >= pack_below_bytes or nbytes > pack_bytes
        if pieces and (alone or packed_bytes + nbytes > pack_bytes):
            messages.append(Message(tuple(pieces), packed_bytes))
            pieces, packed_bytes = [], 0
        piece = regions[region].memory[offset : offset + nbytes]
        if alone:
            messages.append(Message((piece,), nbytes))
        else:
            pieces.append(piece)
            packed_bytes += nbytes
    if pieces:
        messages.append(Message(tuple(pieces), packed_bytes))
    return tuple(messages)
