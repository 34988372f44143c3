"""The embedded server of the `tcp://` store."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # re-exported from C++

from weft.errors import ConfigError, StoreError


class StoreServer:
    """Serves a store from a background thread of this process until `close`; also a context manager.

    It should live in the orchestrator, because what members have agreed on is gone when it is.
    """

    url: str
    """What members pass to `open_store`."""

    def __init__(self, host: str, port: int) -> None:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, _, _, _, address = addresses[0]
            with socket.create_server(address[:2], family=family, backlog=4096) as listener:
                port = listener.getsockname()[1]
                self._server: TCPStore | None = TCPStore(
                    host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
                )
        except (OSError, RuntimeError) as error:
            raise StoreError(f"cannot serve a store at {host}:{port}: {error}") from error
        self.url = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def close(self) -> None:
        """Stop serving; clients fail from now on. Idempotent."""
        self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"StoreServer({self.url!r}, {'closed' if self._server is None else 'serving'})"


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
