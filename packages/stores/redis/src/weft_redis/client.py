"""redis-py with deadlines, and with every one of its errors mapped to weft's, here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from weft.deadline import Deadline
from weft.errors import StoreError
from weft.store_retry import TRIES, insist
from weft_redis.address import Address
from weft_redis.scripts import LATE, LOST

_ADVICE = "is a Redis server running there, and is this the address that other hosts reach?"
_PASSING = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)
"""What may be over soon: no connection, a server that is loading its data, one whose replica takes over."""
_REMEDIES: Sequence[tuple[type[Exception] | tuple[type[Exception], ...], str]] = (
    (
        (redis.exceptions.AuthenticationError, redis.exceptions.AuthenticationWrongNumberOfArgsError),
        "correct user and password in the store's URL",
    ),
    (
        (redis.exceptions.NoPermissionError, redis.exceptions.AuthorizationError),
        "let its user have the keys and channels weft:*, scripts, and the commands of weft-redis's README",
    ),
    (redis.exceptions.OutOfMemoryError, "give the server more memory (maxmemory)"),
    (redis.exceptions.InvalidResponse, "what listens there is no Redis server: correct the store's URL"),
)
"""By class of redis-py's, what to do; the first that fits."""

_CLOSED_SECONDS = 1.0
"""So soon a watch learns that its store was closed; the server is not asked for it."""

T = TypeVar("T")


class Client:
    """A Redis server that is asked under deadlines. Safe to use from several threads."""

    def __init__(self, address: Address, operation_seconds: float) -> None:
        self.url = address.url
        self._address, self._operation_seconds = address, operation_seconds
        self._closed = False
        self._redis = redis.Redis(
            host=address.host,
            port=address.port,
            db=address.database,
            username=address.user,
            password=address.password,
            ssl=address.tls,
            protocol=2,
            socket_timeout=operation_seconds / TRIES,
            socket_connect_timeout=operation_seconds / TRIES,
            retry=Retry(NoBackoff(), 0),  # weft tries again by itself
        )
        self._scripts: dict[str, Any] = {}

    def ask(self, what: str, call: Callable[[Any], T], held_seconds: float = 0.0) -> T:
        """What `call` returns, given the `redis.Redis`. It is called again while there is no answer.

        Raises `StoreError` when there has been none for the operation's time, and `held_seconds` before it.
        """

        def attempt() -> T:
            try:
                return call(self._redis)
            except (redis.exceptions.RedisError, OSError, ValueError) as error:
                raise self._mapped(what, error) from error
            finally:
                if self._closed:
                    self._let_go()

        def refuse() -> None:
            if self._closed:
                raise StoreError(f"store {self.url}: {what}: it is closed")

        deadline = Deadline.after(self._operation_seconds + held_seconds)
        return insist(self.url, what, attempt, deadline, (_PassingError,), refuse, _ADVICE)

    def script(self, what: str, text: str, keys: Sequence[str], arguments: Sequence[bytes | str | int]) -> Any:
        """What a Lua script returns, by its digest, and with its text where the server does not know it."""
        if text not in self._scripts:
            self._scripts[text] = self._redis.register_script(text)
        return self.ask(what, lambda _: self._scripts[text](keys, arguments))

    def heard(self, channel: Any, limit: Deadline) -> bool:
        """Wait for a message on a `redis.client.PubSub`; False at the limit. Raises `StoreError` once it is closed."""
        while not limit.expired():
            if self._closed:
                raise StoreError(f"store {self.url}: watch: it is closed")
            if channel.get_message(timeout=min(limit.remaining(), _CLOSED_SECONDS)) is not None:
                return True
        return False

    def close(self) -> None:
        """Let go of all connections; those that are in use end by themselves, within a second. Idempotent."""
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        # Not of connections that other threads read from: redis-py takes that badly.
        self._redis.connection_pool.disconnect(inuse_connections=False)

    def _mapped(self, what: str, error: Exception) -> Exception:
        words = self._address.without_password(str(error) or type(error).__name__)
        if words.startswith(LOST):
            return StoreError(
                f"store {self.url}: it has lost what it held: its database was emptied, or its server started anew "
                "without it; start all members anew, with a new job name"
            )
        if words.startswith(LATE):
            return StoreError(f"store {self.url}: {what}: its first parts have expired before its last were written")
        for kind, remedy in _REMEDIES:
            if isinstance(error, kind):
                return StoreError(f"store {self.url}: {what}: {words}; {remedy}")
        if isinstance(error, (*_PASSING, OSError)):
            return _PassingError(words)
        return StoreError(f"store {self.url}: {what}: the server says {words!r}")


class _PassingError(Exception):
    """May be over soon."""
