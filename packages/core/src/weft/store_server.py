"""The embedded server of the `tcp://` store: an event loop in a thread, and everything in its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from types import TracebackType
from typing import Self

from weft.errors import ConfigError, RecordError, StoreError
from weft.records import decoded
from weft.store_shelf import Shelf
from weft.store_wire import GREETING, IDENTITY_BYTES, LENGTH_BYTES, Reply, Request, framed, length_in

_BACKLOG = 4096
_END_SECONDS = 10.0


class StoreServer:
    """Serves a store from a background thread of this process until `close`; also a context manager.

    It should live in the orchestrator, because what members have agreed on is gone when it is.
    """

    url: str
    """What members pass to `open_store`."""

    def __init__(self, host: str, port: int) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        except OSError as error:
            raise StoreError(f"cannot serve a store at {host}:{port}: {error}") from error
        port = listener.getsockname()[1]
        self.url = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        self._loop = asyncio.new_event_loop()
        self._service = _Service(listener)
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=[self._service.run()], name=f"weft {self.url}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving; clients fail from now on. Idempotent."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._service.end.set)
            self._thread.join(_END_SECONDS)
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"StoreServer({self.url!r}, {'closed' if self._loop.is_closed() else 'serving'})"


class _Service:
    """Answers every connection until `end`, then tells them."""

    def __init__(self, listener: socket.socket) -> None:
        self.end = asyncio.Event()
        self._listener = listener
        self._identity = os.urandom(IDENTITY_BYTES)
        self._shelf = Shelf()
        self._talks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def run(self) -> None:
        server = await asyncio.start_server(self._talk, sock=self._listener, backlog=_BACKLOG)
        await self.end.wait()
        server.close()
        for task, writer in self._talks.items():
            writer.write(framed(Reply(refusal="its server is closed", closed=True)))
            writer.close()
            task.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client until it goes; whoever says what no client says is left."""
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._talks[task] = writer
        writer.write(GREETING + self._identity)
        try:
            with contextlib.suppress(OSError, EOFError, ValueError, RecordError, asyncio.CancelledError):
                while True:
                    data = await reader.readexactly(length_in(await reader.readexactly(LENGTH_BYTES)))
                    writer.write(framed(await self._shelf.answer(decoded(Request, data, ""))))
                    await writer.drain()
        finally:
            del self._talks[task]
            writer.close()


def serve_store(host: str = "127.0.0.1", port: int = 0) -> StoreServer:
    """Serve a store on exactly this address; port 0 takes any free one (trap 49).

    `host` is the address that members connect to. The default is reached from this machine alone; pass this machine's
    address in a network that only the job's members are on, because whoever reaches the store can take part. Raises
    `ConfigError` for a wildcard address, which no member could connect to, and `StoreError` when the address cannot
    be had.
    """
    if host in ("", "0.0.0.0", "::"):
        raise ConfigError(
            f"serve_store: expected the address that members connect to, found {host!r}, which is every address"
        )
    return StoreServer(host, port)
