"""Opening stores by URL: the scheme names a plug-in of group `weft.stores`; and counting what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from weft.contracts import Store, StoreLease
from weft.deadline import Deadline
from weft.errors import ConfigError
from weft.plugins import load
from weft.store_file import FileStore
from weft.store_tcp import TcpStore

StoreFactory = Callable[[str, Deadline], Store]
"""What an entry point of group `weft.stores` yields: opens a URL, or raises `StoreError` by the deadline."""


def open_store(url: str, deadline: Deadline) -> Store:
    """The store behind a URL such as `tcp://10.0.0.1:29511` or `file:///shared/run7`.

    Raises `ConfigError` for what is not such a URL, `PluginError` for a scheme nobody serves, and `StoreError`,
    naming the address, when the store has not answered by the deadline.
    """
    scheme = urlsplit(url).scheme
    if not scheme or "://" not in url:
        raise ConfigError(
            f"store: expected a URL such as tcp://10.0.0.1:29511 or file:///shared/run7, found {shown(url)!r}"
        )
    factory: StoreFactory = load("weft.stores", scheme)
    return factory(url, deadline)


def shown(url: str) -> str:
    """The URL without what stands before its `@`: passwords are shown to nobody."""
    secret, mark, rest = url.rpartition("@")
    return f"{secret.partition(':')[0]}://…@{rest}" if mark else url


def open_tcp(url: str, deadline: Deadline) -> Store:
    """`tcp://host:port`: the server that `serve_store` started. Tries to connect until the deadline."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"store {shown(url)}: {error}") from error
    if not parts.hostname or not port or parts.path not in ("", "/") or parts.query:
        raise ConfigError(f"store: expected tcp://host:port, found {shown(url)!r}")
    return TcpStore(parts.hostname, port, deadline)


def open_file(url: str, deadline: Deadline) -> Store:
    """`file:///directory`: a directory that all members see, made when missing, on a file system with `flock`."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.path == "/":
        raise ConfigError(f"store: expected file:///absolute/directory, found {shown(url)!r}")
    return FileStore(unquote(parts.path), deadline)


class CountedStore:
    """A store that counts its operations, those of its leases among them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.operations = 0

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`."""
        self.operations += 1
        self._store.set(key, value)

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        self.operations += 1
        return self._store.get(key)

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        self.operations += 1
        return self._store.add(key, amount)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self.operations += 1
        self._store.delete(key)

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`."""
        self.operations += 1
        return self._store.keys(prefix)

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        """See `Store.lease`."""
        self.operations += 1
        return _CountedLease(self, self._store.lease(key, value, seconds))

    def watch(self, key: str, known: bytes | None, deadline: Deadline) -> bytes | None:
        """See `Store.watch`."""
        self.operations += 1
        return self._store.watch(key, known, deadline)

    def close(self) -> None:
        """See `Store.close`."""
        self._store.close()


class _CountedLease:
    def __init__(self, store: CountedStore, lease: StoreLease) -> None:
        self.key, self.seconds = lease.key, lease.seconds
        self._store, self._lease = store, lease

    def renew(self) -> None:
        self._store.operations += 1
        self._lease.renew()

    def release(self) -> None:
        self._store.operations += 1
        self._lease.release()
