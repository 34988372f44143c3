"""The `tcp://` store: torch's TCPStore with what it lacks: large values, reads that do not block, and deadlines.

TCPStore drops the connection of whoever sends it more than 8 MiB, blocks in `get` until the key appears, returns from
`set` before the server has the value, and waits for ever on a server that is stopped but not dead. So large values
travel in parts, reads are comparisons that fail, a question follows every `set`, and every operation runs on a thread
of the store's own that callers wait for with a limit.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # re-exported from C++

from weft.deadline import Deadline
from weft.errors import StoreError

_PART_BYTES = 4 << 20
_RETRY_SECONDS = 0.1
LIMIT_BYTES = 1 << 30
"""Largest value."""

# TCPStore's flat name space is divided by the first character: values, counters, parts of large values.
_VALUE, _COUNTER, _PART = "v", "c", "p"
# First byte of a stored value: the value itself follows, or the name and number of its parts.
_WHOLE, _PARTED = b"w", b"p"
# No stored value is equal to this, because none starts with it; comparing with it reads without blocking.
_NOTHING = "?"

T = TypeVar("T")


class TcpStore:
    """A client of `StoreServer`. Safe to use from several threads; an operation waits at most `operation_seconds`."""

    def __init__(self, host: str, port: int, deadline: Deadline, *, operation_seconds: float = 30.0) -> None:
        self.url = f"tcp://{host}:{port}"
        self._operation_seconds = operation_seconds
        _reach(host, port, deadline)
        seconds = max(deadline.remaining(), 0.1)
        self._calls = _Calls(self.url)
        self._client = self._calls.run("connect", lambda: _client(host, port, seconds), seconds)

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`. At most `LIMIT_BYTES`. Readers see the old value or the new one, never a part."""
        if len(value) > LIMIT_BYTES:
            raise StoreError(f"store {self.url}: set {key!r}: expected at most {LIMIT_BYTES} bytes, found {len(value)}")
        old = self._head(key)
        if len(value) < _PART_BYTES:
            self._set(_VALUE + key, _WHOLE + value)
        else:
            name = uuid.uuid4().hex
            parts = [value[start : start + _PART_BYTES] for start in range(0, len(value), _PART_BYTES)]
            for index, part in enumerate(parts):
                self._set(f"{_PART}{name}/{index}", _WHOLE + part)
            manifest = f"{name}/{len(parts)}".encode()
            self._set(_VALUE + key, _PARTED + manifest)
        self._delete_parts(old)

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        while True:
            head = self._head(key)
            if head is None:
                return None
            if head[:1] == _WHOLE:
                return head[1:]
            parts = [self._raw(name) for name in _part_names(head)]
            if None not in parts:
                return b"".join(part[1:] for part in parts if part is not None)
            if self._head(key) == head:
                raise StoreError(
                    f"store {self.url}: get {key!r}: {parts.count(None)} of its {len(parts)} parts are missing"
                )

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        total: int = self._run(f"add to {key!r}", lambda: self._client.add(_COUNTER + key, amount))
        return total

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        head = self._head(key)
        for name in (_VALUE + key, _COUNTER + key):
            self._delete(name)
        self._delete_parts(head)

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`. The server sends the names of all its keys: not for hot paths."""
        names = self._run(f"list {prefix!r}", lambda: self._client.list_keys())
        return sorted({name[1:] for name in names if name[:1] in (_VALUE, _COUNTER) and name[1:].startswith(prefix)})

    def close(self) -> None:
        """See `Store.close`."""
        self._calls.stop()

    def __repr__(self) -> str:
        return f"TcpStore({self.url!r})"

    def _run(self, what: str, call: Callable[[], T]) -> T:
        return self._calls.run(what, call, self._operation_seconds)

    def _raw(self, name: str) -> bytes | None:
        found: bytes = self._run(f"get {name[1:]!r}", lambda: self._client.compare_set(name, _NOTHING, _NOTHING))
        return None if found == _NOTHING.encode() else found

    def _head(self, key: str) -> bytes | None:
        return self._raw(_VALUE + key)

    def _set(self, name: str, stored: bytes) -> None:
        def call() -> None:
            self._client.set(name, stored)  # type: ignore[arg-type]  # the stub says str; bytes are taken as they are
            self._client.check([name])

        self._run(f"set {name[1:]!r}", call)

    def _delete(self, name: str) -> None:
        self._run(f"delete {name[1:]!r}", lambda: self._client.delete_key(name))

    def _delete_parts(self, head: bytes | None) -> None:
        if head is not None and head[:1] == _PARTED:
            for name in _part_names(head):
                self._delete(name)


def _part_names(head: bytes) -> list[str]:
    name, _, count = head[1:].decode().partition("/")
    return [f"{_PART}{name}/{index}" for index in range(int(count))]


def _client(host: str, port: int, seconds: float) -> TCPStore:
    # Clients wait for the rest of a world unless told otherwise; weft counts members itself.
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def _reach(host: str, port: int, deadline: Deadline) -> None:
    """Wait until something listens there: TCPStore's own retries know no short deadlines and write to stderr."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(deadline.remaining(), 0.1)).close()
            return
        except OSError as error:
            if deadline.remaining() < _RETRY_SECONDS:
                raise StoreError(
                    f"store tcp://{host}:{port}: not reached within {deadline.seconds:.1f} s: {error}; "
                    "is its server running, and is this the address that other hosts reach?"
                ) from error
            time.sleep(_RETRY_SECONDS)


class _Calls:
    """One thread that makes the calls, so that callers can stop waiting. One that is given up ends the store."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._queue: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        self._refusal: str | None = None
        threading.Thread(target=self._work, name=f"weft store {url}", daemon=True).start()

    def run(self, what: str, call: Callable[[], T], seconds: float) -> T:
        """The result of `call`, made on the thread. Raises `StoreError` when it fails or has no result in time."""
        if self._refusal is not None:
            raise StoreError(f"store {self._url}: {what}: {self._refusal}")
        future: Future[T] = Future()
        self._queue.put((future, call))  # type: ignore[arg-type]  # a queue of futures of any type
        try:
            return future.result(timeout=seconds)
        except TimeoutError as error:
            self._refusal = f"an earlier operation ({what}) had no answer within {seconds:.1f} s; open the store again"
            raise StoreError(f"store {self._url}: {what}: no answer within {seconds:.1f} s") from error
        except RuntimeError as error:  # every error of TCPStore is one
            raise StoreError(f"store {self._url}: {what}: {error}") from error

    def stop(self) -> None:
        """End the thread after the calls it has. Idempotent."""
        self._refusal = "it is closed"
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  # it belongs to the caller, who waits for it
                future.set_exception(error)
