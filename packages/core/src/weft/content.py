"""Content-addressed publishing: large things that many members share, such as layouts, are in the store once.

Content carries no envelope: its address, which travels in a record, says exactly which bytes it must be.
"""

from __future__ import annotations

import hashlib

from weft.contracts import Store
from weft.errors import RecordError

LIMIT_BYTES = 256 << 20
"""Most bytes of one content."""


def put_content(store: Store, prefix: str, data: bytes) -> str:
    """Publish bytes under `prefix` unless they are there already; returns their address, the SHA-256 in hex.

    Raises `RecordError` for more than `LIMIT_BYTES`.
    """
    _check_size(prefix, data)
    address = hashlib.sha256(data).hexdigest()
    if store.get(f"{prefix}/{address}/published") is None:
        store.set(f"{prefix}/{address}/bytes", data)
        store.set(f"{prefix}/{address}/published", b"1")
    return address


def get_content(store: Store, prefix: str, address: str) -> bytes:
    """What was published. Raises `RecordError` when there is nothing, or something that has another address."""
    data = store.get(f"{prefix}/{address}/bytes")
    if data is None:
        raise RecordError(
            f"content {address}: expected it under {prefix}, found nothing; was it published to another store or job?"
        )
    _check_size(prefix, data)
    found = hashlib.sha256(data).hexdigest()
    if found != address:
        raise RecordError(f"content {address} under {prefix}: found {len(data)} bytes with SHA-256 {found}")
    return data


def _check_size(prefix: str, data: bytes) -> None:
    if len(data) > LIMIT_BYTES:
        raise RecordError(f"content under {prefix}: expected at most {LIMIT_BYTES} bytes, found {len(data)}")
