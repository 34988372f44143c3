"""Frames on a TCP connection, and the thread that sends them."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from weft.errors import PeerLostError, RecordError

_HEADER_LIMIT_BYTES = 64 << 20


class Header(msgspec.Struct, frozen=True, array_like=True):
    """What precedes the bytes of a frame."""

    message: bytes
    """A message as `weft.endpoint.encode` writes it; the first frame of a connection has the sender's identity."""
    places: bytes = b""
    """Where the bytes go: (address of a region, its size, offset, bytes) of each segment, as int64."""


@dataclass(slots=True, eq=False)
class Frame:
    """A header and the memory that follows it."""

    header: Header
    memory: Sequence[memoryview] = ()
    done: bool = False
    cancelled: bool = False
    error: PeerLostError | None = None


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Length of the header, header, bytes."""
    header = msgspec.msgpack.encode(frame.header)
    connection.sendall(len(header).to_bytes(8, "little") + header)
    for view in frame.memory:
        connection.sendall(view)


def receive(connection: socket.socket, view: memoryview) -> bool:
    """Fill `view`; False when the connection has ended before. No buffer: what is read goes where it belongs."""
    while view:
        count = connection.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def receive_header(connection: socket.socket) -> Header | None:
    """The next header, or None at the end. Raises `RecordError` for what is none."""
    size = bytearray(8)
    if not receive(connection, memoryview(size)):
        return None
    length = int.from_bytes(size, "little")
    if length > _HEADER_LIMIT_BYTES:
        raise RecordError(f"a header of {length} bytes, at most {_HEADER_LIMIT_BYTES} are allowed")
    data = bytearray(length)
    if not receive(connection, memoryview(data)):
        return None
    try:
        return msgspec.msgpack.decode(data, type=Header)
    except msgspec.MsgspecError as error:
        raise RecordError(f"{length} bytes that are not a header: {error}") from error


class Channel:
    """Frames on their way to one peer, in order. A thread sends them, so that a frozen peer blocks nobody else."""

    def __init__(self, peer: str, connection: socket.socket, lost: Callable[[PeerLostError], None]) -> None:
        self.peer = peer
        self.error: PeerLostError | None = None
        """Why nothing is sent any more."""
        self._connection, self._lost = connection, lost
        self._closed = False
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"send to {peer}", daemon=True)
        self.thread.start()

    def submit(self, frame: Frame) -> None:
        """Send a frame after those that were submitted before."""
        self._frames.put(frame)

    def finish(self) -> None:
        """End the connection once everything has been sent that was submitted before."""
        self._frames.put(None)

    def close(self) -> None:
        """End the connection; what has not been sent fails, and is no loss any more: the peer may have a new one."""
        self._closed = True
        self._frames.put(None)
        hang_up(self._connection)

    def _run(self) -> None:
        with self._connection:
            while (frame := self._frames.get()) is not None:
                if frame.cancelled:
                    continue
                if self.error is None:
                    try:
                        send_frame(self._connection, frame)
                    except OSError as error:
                        self.error = PeerLostError(self.peer, f"sending failed: {error}")
                        if not self._closed:
                            self._lost(self.error)
                frame.error, frame.done = self.error, True


def hang_up(connection: socket.socket) -> None:
    """Wake whoever reads or writes it; they find the end."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended already
        connection.close()
