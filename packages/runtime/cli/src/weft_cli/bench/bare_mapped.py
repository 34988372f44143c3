"""Bare `process_vm_writev`: two threads that write plain chunks, and a byte over a socket after the last."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import TransportError
from weft_cli.bench.bare import wait_for

_THREADS = 2
"""As the transport has by default."""
_DONE = b"."


class MappedPair:
    """See `weft_cli.bench.bare.Pair`."""

    def __init__(self, connection: socket.socket, own: int, peer: tuple[int, int] | None) -> None:
        """`own` is the memory's address; `peer` the receiver's process and address, None at the receiver."""
        self._connection, self._own, self._peer = connection, own, peer
        self._threads = ThreadPoolExecutor(_THREADS)
        self._library = ctypes.CDLL(None, use_errno=True)
        self._library.process_vm_writev.restype = ctypes.c_ssize_t

    def move(self, nbytes: int, chunk_bytes: int, deadline: Deadline) -> None:
        """See `Pair.move`."""
        self._connection.settimeout(deadline.remaining())
        if self._peer is not None:
            starts = iter(range(0, nbytes, chunk_bytes))  # whose `next` is one step of the interpreter
            work = [self._threads.submit(self._write, starts, nbytes, chunk_bytes) for _ in range(_THREADS)]
            for each in work:
                each.result(deadline.remaining())
            self._connection.sendall(_DONE)
        self._connection.recv(1)
        if self._peer is None:
            self._connection.sendall(_DONE)

    def _write(self, starts: Iterator[int], nbytes: int, chunk_bytes: int) -> None:
        assert self._peer is not None
        process, address = self._peer
        for start in starts:
            size = min(chunk_bytes, nbytes - start)
            vectors = [(ctypes.c_size_t * 2)(base + start, size) for base in (self._own, address)]
            local, remote = (ctypes.byref(vector) for vector in vectors)
            one = ctypes.c_ulong(1)
            written = self._library.process_vm_writev(process, local, one, remote, one, ctypes.c_ulong(0))
            if written != size:
                raise TransportError(f"bare process_vm_writev: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        """End threads and connection."""
        self._threads.shutdown()
        self._connection.close()


def open_pair(store: Store, key: str, *, sends: bool, memory: torch.Tensor, deadline: Deadline) -> MappedPair:
    """See `weft_cli.bench.bare.open_pair`."""
    if not sends:
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = (server.getsockname()[1], os.getpid(), memory.data_ptr())
            store.set(f"{key}/receiver", " ".join(map(str, place)).encode())
            server.settimeout(deadline.remaining())
            connection, _ = server.accept()
    else:
        port, process, address = map(int, wait_for(store, f"{key}/receiver", deadline).split())
        connection = socket.create_connection(("127.0.0.1", port), timeout=deadline.remaining())
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return MappedPair(connection, memory.data_ptr(), (process, address) if sends else None)
