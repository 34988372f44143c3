"""What server and clients of the `tcp://` store say: a greeting, then frames, each a length and a msgpack array.

The server greets with `GREETING` and its identity, 16 bytes. Every request has one reply, in order. A server that
is closed says so with a reply that nobody has asked for.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

GREETING = b"weft-store 1\n"
IDENTITY_BYTES = 16
LENGTH_BYTES = 8
"""Big-endian, before every frame."""
LIMIT_BYTES = 1 << 30
"""Largest value."""
_FRAME_BYTES = LIMIT_BYTES + (1 << 20)

Operation = Literal["set", "get", "add", "delete", "keys", "lease", "renew", "release", "watch"]


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One operation of `Store`."""

    operation: Operation
    key: str
    value: bytes | None = None
    """To write; of `watch`, what is known."""
    number: int = 0
    """To add."""
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    """Of a lease; of `watch`, when to answer at the latest."""
    token: bytes = b""
    """Of `add`, so that it counts once; of a lease, who holds it."""


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """What an operation returns."""

    value: bytes | None = None
    number: int = 0
    names: tuple[str, ...] = ()
    refusal: str = ""
    """Why there is no other answer."""
    closed: bool = False
    """The server was closed; there will be no answer to anything."""


def framed(message: Request | Reply) -> bytes:
    """The bytes of a message, with their length before them."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def length_in(head: bytes) -> int:
    """The length that a frame starts with. Raises `ValueError` for one that no message has."""
    length = int.from_bytes(head, "big")
    if length > _FRAME_BYTES:
        raise ValueError(f"expected a frame of at most {_FRAME_BYTES} bytes, found {length}")
    return length
