"""Connections of one client to the server of the `tcp://` store: one for every thread that asks at the same time."""

from __future__ import annotations

import contextlib
import select
import socket
import threading

from weft.deadline import Deadline
from weft.errors import RecordError, StoreError
from weft.records import decoded
from weft.store_wire import GREETING, IDENTITY_BYTES, LENGTH_BYTES, Reply, length_in

BROKEN = (OSError, EOFError, ValueError, RecordError)
"""What `Connections.exchange` raises when a connection broke, none could be made, or what came is no answer."""
_READ_BYTES = 1 << 20


class Connections:
    """Makes connections as they are needed, and keeps them."""

    def __init__(self, url: str, host: str, port: int) -> None:
        self._url, self._address = url, (host, port)
        self._identity: bytes | None = None
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._closed = False

    def exchange(self, data: bytes, limit: Deadline) -> Reply:
        """Send a request and wait for its reply. Raises one of `BROKEN`, or `StoreError` where another try is useless:
        what answers is no store, or one that has lost what it held.
        """
        connection = self._take(limit)
        try:
            # An idle connection on which something has come has ended, or says that the server is closed.
            if not _readable(connection):
                _send(connection, data, limit)
            reply = decoded(
                Reply, _receive(connection, length_in(_receive(connection, LENGTH_BYTES, limit)), limit), ""
            )
        except BaseException:
            self._end(connection)
            raise
        with self._lock:
            self._busy.discard(connection)
            if not self._closed:
                self._idle.append(connection)
                return reply
        connection.close()
        return reply

    def close(self) -> None:
        """End all; exchanges in other threads fail. Idempotent."""
        with self._lock:
            self._closed = True
            for connection in self._busy:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _take(self, limit: Deadline) -> socket.socket:
        with self._lock:
            if self._closed:
                raise ConnectionError("closed")
            if self._idle:
                self._busy.add(connection := self._idle.pop())
                return connection
        connection = socket.create_connection(self._address, timeout=_left(limit))
        with self._lock:
            self._busy.add(connection)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._meet(_receive(connection, len(GREETING) + IDENTITY_BYTES, limit))
        except BaseException:
            self._end(connection)
            raise
        return connection

    def _meet(self, greeting: bytes) -> None:
        identity = greeting[len(GREETING) :]
        if not greeting.startswith(GREETING):
            raise StoreError(f"store {self._url}: it is no store of this version of weft: it says {greeting!r}")
        if self._identity not in (None, identity):
            raise StoreError(
                f"store {self._url}: it has lost what it held: its server was started anew; "
                "start all members anew, too, with a new job name"
            )
        self._identity = identity

    def _end(self, connection: socket.socket) -> None:
        with self._lock:
            self._busy.discard(connection)
        connection.close()


def _readable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _left(limit: Deadline) -> float:
    if limit.expired():
        raise TimeoutError("timed out")
    return limit.remaining()


def _send(connection: socket.socket, data: bytes, limit: Deadline) -> None:
    connection.settimeout(_left(limit))  # of the whole of `sendall`
    connection.sendall(data)


def _receive(connection: socket.socket, nbytes: int, limit: Deadline) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        connection.settimeout(_left(limit))
        part = connection.recv(min(nbytes - len(data), _READ_BYTES))
        if not part:
            raise EOFError("the connection was closed")
        data += part
    return bytes(data)
