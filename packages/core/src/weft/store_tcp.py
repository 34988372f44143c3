"""The client of the `tcp://` store, which `serve_store` serves."""

from __future__ import annotations

import os

from weft.contracts import StoreLease
from weft.deadline import Deadline
from weft.errors import StoreError
from weft.store_connection import BROKEN, Connections
from weft.store_lease import KeyLease, check_lease
from weft.store_retry import ASK_AGAIN_SECONDS, TRIES, insist
from weft.store_wire import LIMIT_BYTES, Reply, Request, framed

_ADVICE = "is its server running, and is this the address that other hosts reach?"
_TOKEN_BYTES = 16
_SHORTEST_SECONDS = 0.1


class TcpStore:
    """A client of `StoreServer`. Safe to use from several threads.

    An operation waits at most `operation_seconds`, also for a server that is away. One that was closed on purpose, or
    that comes back as another, with nothing of what was held, is an error at once.
    """

    def __init__(self, host: str, port: int, deadline: Deadline, *, operation_seconds: float = 30.0) -> None:
        self.url = f"tcp://{host}:{port}"
        self._operation_seconds = operation_seconds
        self._refusal = ""
        self._connections = Connections(self.url, host, port)
        self._ask("open", Request("get", ""), max(deadline.remaining(), _SHORTEST_SECONDS))

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`. At most `LIMIT_BYTES`."""
        if len(value) > LIMIT_BYTES:
            raise StoreError(f"store {self.url}: set {key!r}: expected at most {LIMIT_BYTES} bytes, found {len(value)}")
        self._run(f"set {key!r}", Request("set", key, value))

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        return self._run(f"get {key!r}", Request("get", key)).value

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        request = Request("add", key, number=amount, token=os.urandom(_TOKEN_BYTES))
        return self._run(f"add to {key!r}", request).number

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._run(f"delete {key!r}", Request("delete", key))

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`."""
        return list(self._run(f"list {prefix!r}", Request("keys", prefix)).names)

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        """See `Store.lease`. The server's monotonic clock counts, while the server runs."""
        check_lease(self.url, key, value, seconds)
        token = os.urandom(_TOKEN_BYTES)
        self._run(f"lease {key!r}", Request("lease", key, value, seconds=seconds, token=token))
        renewal, release = Request("renew", key, token=token), Request("release", key, token=token)
        return KeyLease(
            self.url,
            key,
            seconds,
            lambda: self._run(f"renew {key!r}", renewal).number == 1,
            lambda: self._run(f"release {key!r}", release),
        )

    def watch(self, key: str, known: bytes | None, deadline: Deadline) -> bytes | None:
        """See `Store.watch`. The server answers when there is something new."""
        while True:
            seconds = min(deadline.remaining(), ASK_AGAIN_SECONDS)
            request = Request("watch", key, known, seconds=seconds)
            value = self._ask(f"watch {key!r}", request, self._operation_seconds, seconds).value
            if value != known or deadline.expired():
                return value

    def close(self) -> None:
        """See `Store.close`."""
        self._refusal = "it is closed"
        self._connections.close()

    def __repr__(self) -> str:
        return f"TcpStore({self.url!r})"

    def _run(self, what: str, request: Request) -> Reply:
        return self._ask(what, request, self._operation_seconds)

    def _ask(self, what: str, request: Request, seconds: float, held_seconds: float = 0.0) -> Reply:
        """The reply to a request, which the server may hold back for `held_seconds`."""
        data, deadline = framed(request), Deadline.after(held_seconds + seconds)

        def attempt() -> Reply:
            limit = min(deadline.remaining(), held_seconds + seconds / TRIES)
            return self._connections.exchange(data, Deadline.after(limit))

        def refuse() -> None:
            if self._refusal:
                raise StoreError(f"store {self.url}: {what}: {self._refusal}")

        reply = insist(self.url, what, attempt, deadline, BROKEN, refuse, _ADVICE)
        if reply.closed:
            self._refusal = reply.refusal
        if reply.refusal:
            raise StoreError(f"store {self.url}: {what}: {reply.refusal}")
        return reply
