"""What travels over a link: an envelope, announced by a head, and payload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.endpoint import SIGNAL_LIMIT_BYTES
from weft.errors import RecordError, TransportError
from weft_gloo.messages import Message

HEAD_BYTES = 512
"""Size of every head: four bytes of length, then what fits of the envelope; the rest of it is a message by itself."""
_LENGTH_BYTES = 4
_LIMIT_BYTES = 2 * SIGNAL_LIMIT_BYTES
FAREWELL = b""
"""The envelope of who closes, and the answer to it: gloo loses what has arrived but was not looked at when a connection
ends.
"""


@dataclass(eq=False)
class Parcel:
    """An envelope and the payload that follows it."""

    envelope: bytes
    payload: Sequence[Message]
    started: bool = False
    done: bool = False
    error: TransportError | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """Where a bucket's payload goes."""

    payload: Sequence[Message]
    wanted: bool = True
    """False for what nobody waits for any more: it is taken in and dropped."""


SIGNAL = Expected(())
"""No payload."""


def announcement(envelope: bytes) -> list[torch.Tensor]:
    """The head and, where that is too short for the envelope, the rest of it."""
    wire = len(envelope).to_bytes(_LENGTH_BYTES, "little") + envelope
    parts = [wire[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0"), wire[HEAD_BYTES:]]
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts if part]


def read_head(head: torch.Tensor, peer: str) -> tuple[bytes, int]:
    """What it has of the envelope, and how many bytes are missing. Raises `RecordError` when it cannot be a head."""
    wire = head.numpy().tobytes()
    length = int.from_bytes(wire[:_LENGTH_BYTES], "little")
    if length > _LIMIT_BYTES:
        raise RecordError(f"{peer} announces an envelope of {length} bytes")
    body = wire[_LENGTH_BYTES : _LENGTH_BYTES + length]
    return body, length - len(body)
