"""The envelope of every record that crosses a process boundary through the store.

Bytes of a record: `MAGIC`, then a msgpack array of format version, kind, authentication code, payload. The payload is
the msgpack of one schema. Readers skip array elements they do not know and default those that are missing, in the
envelope as in array-like payloads, so neighbouring versions of weft interoperate as long as new fields go to the end
and have defaults. `tests/golden` keeps payloads of every kind as they were written, which must be read for ever; who
changes what is written adds those of now (`tests/payloads.py`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from weft.authentication import Key
from weft.errors import RecordError

MAGIC = b"weft"
RECORD_FORMAT = 1
"""Grows only when older readers must not try; new fields at the end do not change it."""

DEFAULT_LIMIT_BYTES = 64 << 20
LIMIT_BYTES: Mapping[str, int] = {"rendezvous": 1 << 20, "slice": 256 << 20, "offer": 1 << 16, "outcome": 1 << 20}
"""Largest record per kind; kinds that are not named may have `DEFAULT_LIMIT_BYTES`."""

CODE_BYTES = 32
_REMEDY = "give every member of the job the same one: secret=…, WEFT_SECRET or WEFT_SECRET_FILE"

T = TypeVar("T")
_making = threading.Lock()


class _Envelope(msgspec.Struct, array_like=True):
    """New fields go to the end, with defaults."""

    format: int
    kind: str
    code: bytes
    """Authentication code over the rest and the record's place; empty when there is no job secret."""
    payload: bytes


def seal(kind: str, obj: object, *, place: str = "", key: Key | None = None) -> bytes:
    """Wrap `obj` (anything msgspec encodes) as a record of this kind, for one place in the store.

    With a key of the job it carries a code that fits nowhere else. Raises `RecordError` when it is larger than its kind
    allows.
    """
    payload = msgspec.msgpack.encode(obj)
    code = key.code(*_coded(kind, place, payload)) if key else b""
    data = MAGIC + msgspec.msgpack.encode(_Envelope(RECORD_FORMAT, kind, code, payload))
    _check_size(kind, data)
    return data


def open_record(kind: str, type: type[T], data: bytes, *, place: str = "", key: Key | None = None) -> T:
    """The object in a record of this kind and schema, found at this place in the store.

    With a key the code must fit, before anything of the payload is looked at; without one there must be none. Whatever
    is wrong with the bytes, it is a `RecordError`.
    """
    _check_size(kind, data)
    if data[: len(MAGIC)] != MAGIC:
        raise RecordError(f"{kind} record: expected bytes that start with {MAGIC!r}, found {bytes(data[:8])!r}")
    envelope = _decode(f"envelope of a {kind} record", _Envelope, data[len(MAGIC) :])
    if envelope.format != RECORD_FORMAT:
        raise RecordError(
            f"{kind} record: expected format {RECORD_FORMAT}, found {envelope.format}; use one version of weft in a job"
        )
    _check_code(kind, envelope, place, key)
    if envelope.kind != kind:
        raise RecordError(f"expected a {kind!r} record, found {envelope.kind!r}")
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


def _check_code(kind: str, envelope: _Envelope, place: str, key: Key | None) -> None:
    if key is None:
        if envelope.code:
            raise RecordError(f"{kind} record: it carries an authentication code: the job has a secret; {_REMEDY}")
    elif not envelope.code:
        raise RecordError(f"{kind} record: it carries no authentication code: its writer has no secret; {_REMEDY}")
    elif len(envelope.code) != CODE_BYTES or not key.fits(
        envelope.code, *_coded(envelope.kind, place, envelope.payload)
    ):
        raise RecordError(
            f"{kind} record: its authentication code is wrong: the members' secrets differ, or somebody else writes "
            f"here; {_REMEDY}"
        )


def _coded(kind: str, place: str, payload: bytes) -> tuple[bytes, ...]:
    return str(RECORD_FORMAT).encode(), kind.encode(), place.encode(), payload
