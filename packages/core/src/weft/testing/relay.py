"""A stretch of network that tests can cut: a TCP relay on this machine."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Self

_READ_BYTES = 1 << 16


class Relay:
    """Listens on `port` of 127.0.0.1 and passes everything to `to_port` there, until told otherwise.

    Also a context manager.
    """

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        """Where new connections lead."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends: set[socket.socket] = set()
        self._losing = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="relay", daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """End all connections; new ones are made as before."""
        for end in list(self._ends):
            _shut(end)

    def lose_next_answer(self) -> None:
        """End the connection on which the next bytes come back, without passing them on."""
        self._losing.set()

    def close(self) -> None:
        """End everything. Idempotent."""
        _shut(self._listener)
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._ends.add(client)
                self._threads.append(threading.Thread(target=self._pass_on, args=[client], name="relay", daemon=True))
                self._threads[-1].start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.to_port)) as server:
            self._ends.add(server)
            sinks = {client: server, server: client}
            while all(self._passed(source, sinks[source]) for source in select.select(sinks, [], [])[0]):
                pass
            self._ends.discard(server)
        self._ends.discard(client)

    def _passed(self, source: socket.socket, sink: socket.socket) -> bool:
        data = source.recv(_READ_BYTES)
        if sink.getsockname()[1] == self.port and self._losing.is_set():
            self._losing.clear()
            return False
        sink.sendall(data)
        return bool(data)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
