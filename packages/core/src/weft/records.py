"""The envelope of every record that crosses a process boundary through the store.

Bytes of a record: `MAGIC`, then a msgpack array of format version, kind, authentication code, payload. The payload is
the msgpack of one schema. Readers skip array elements they do not know and default those that are missing, in the
envelope as in array-like payloads, so neighbouring versions of weft interoperate as long as new fields go to the end
and have defaults.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from weft.errors import NotSupportedError, RecordError

MAGIC = b"weft"
RECORD_FORMAT = 1
"""Grows only when older readers must not try; new fields at the end do not change it."""

DEFAULT_LIMIT_BYTES = 64 << 20
LIMIT_BYTES: Mapping[str, int] = {"rendezvous": 1 << 20}
"""Largest record per kind; kinds that are not named may have `DEFAULT_LIMIT_BYTES`."""

T = TypeVar("T")
_making = threading.Lock()


class _Envelope(msgspec.Struct, array_like=True):
    """New fields go to the end, with defaults."""

    format: int
    kind: str
    code: bytes
    """Authentication code over the rest; empty when there is no job secret."""
    payload: bytes


def seal(kind: str, obj: object, *, secret: bytes | None = None) -> bytes:
    """Wrap `obj` (anything msgspec encodes) as a record of this kind.

    Raises `RecordError` when it is larger than its kind allows, `NotSupportedError` when a job secret is given.
    """
    _refuse_secret(secret)
    envelope = _Envelope(RECORD_FORMAT, kind, b"", msgspec.msgpack.encode(obj))
    data = MAGIC + msgspec.msgpack.encode(envelope)
    _check_size(kind, data)
    return data


def open_record(kind: str, type: type[T], data: bytes, *, secret: bytes | None = None) -> T:
    """The object in a record of this kind and schema. Whatever is wrong with the bytes, it is a `RecordError`."""
    _refuse_secret(secret)
    _check_size(kind, data)
    if data[: len(MAGIC)] != MAGIC:
        raise RecordError(f"{kind} record: expected bytes that start with {MAGIC!r}, found {bytes(data[:8])!r}")
    envelope = _decode(f"envelope of a {kind} record", _Envelope, data[len(MAGIC) :])
    if envelope.format != RECORD_FORMAT:
        raise RecordError(
            f"{kind} record: expected format {RECORD_FORMAT}, found {envelope.format}; use one version of weft in a job"
        )
    if envelope.kind != kind:
        raise RecordError(f"expected a {kind!r} record, found {envelope.kind!r}")
    if envelope.code:
        raise RecordError(
            f"{kind} record: expected no authentication code, found one of {len(envelope.code)} bytes, "
            "which this version of weft cannot check; leave the job secret unset"
        )
    return _decode(f"{kind} record", type, envelope.payload)


def decoded(type: type[T], data: bytes, fault: str) -> T:
    """msgpack as an object of this type. Whatever is wrong with the bytes, it is a `RecordError`: `fault`, and why."""
    try:
        return decoder_of(type).decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{fault}: {error}") from error


def decoder_of(type: type[T]) -> msgspec.msgpack.Decoder[T]:
    """The decoder of a type, made in one thread at a time: msgspec 0.22 crashes when two of them use a type for the
    first time.
    """
    key: Any = type
    with _making:
        return _decoder(key)


@functools.cache
def _decoder(type: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(type)


def _decode(what: str, type: type[T], data: bytes) -> T:
    return decoded(type, data, f"{what}: expected the schema {type.__name__}, found {len(data)} bytes that are not it")


def _check_size(kind: str, data: bytes) -> None:
    limit_bytes = LIMIT_BYTES.get(kind, DEFAULT_LIMIT_BYTES)
    if len(data) > limit_bytes:
        raise RecordError(f"{kind} record: expected at most {limit_bytes} bytes, found {len(data)}")


def _refuse_secret(secret: bytes | None) -> None:
    if secret is not None:
        raise NotSupportedError(
            "record authentication is not supported yet: leave the job secret unset, keep the store's network private"
        )
