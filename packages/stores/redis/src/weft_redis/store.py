"""The store: what `weft.contracts.Store` promises, in terms of what a Redis server does."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from functools import partial
from operator import methodcaller
from typing import Any

from weft.contracts import Store, StoreLease
from weft.deadline import Deadline
from weft.errors import StoreError
from weft.store_lease import KeyLease, check_lease
from weft.store_retry import ASK_AGAIN_SECONDS
from weft_redis.address import Address
from weft_redis.client import Client
from weft_redis.scripts import (
    ADD,
    COUNTER,
    DELETE,
    IDENTITY,
    LEASED,
    LOST,
    PART,
    PARTED,
    PLAIN,
    PUT,
    RELEASE,
    RENEW,
    SUM,
    TOKEN_BYTES,
    VALUE,
    WRITING_MS,
)

LIMIT_BYTES = 1 << 30
"""Largest value."""
PART_BYTES = (1 << 20) - 64
"""What is larger travels in parts: no server can be told to refuse strings of 1 MiB (`proto-max-bulk-len`)."""
_PARTS_AT_ONCE = 16
_SCAN = 1000


def open_redis(url: str, deadline: Deadline) -> Store:
    """`redis://[user:password@]host[:port][/database]`, or `rediss://` for TLS: the entry point of `weft.stores`.

    Tries to connect until the deadline. Raises `ConfigError` for what is no such URL.
    """
    return RedisStore(Address.parse(url), deadline)


class RedisStore:
    """A database of a Redis server. Safe to use from several threads.

    An operation waits at most `operation_seconds`, also for a server that is away; one on a value in parts waits so
    long for any of them.
    """

    def __init__(self, address: Address, deadline: Deadline, *, operation_seconds: float = 30.0) -> None:
        self.url = address.url
        self._channels = f"weft:{address.database}:"
        opening = Client(address, max(deadline.remaining(), 0.1))
        try:
            self._identity: bytes = opening.ask("open", _founded)
        finally:
            opening.close()
        self._client = Client(address, operation_seconds)

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`. At most `LIMIT_BYTES`."""
        if len(value) > LIMIT_BYTES:
            raise StoreError(f"store {self.url}: set {key!r}: expected at most {LIMIT_BYTES} bytes, found {len(value)}")
        if len(value) <= PART_BYTES:
            self._put(f"set {key!r}", key, PLAIN + value)
            return
        name, starts = uuid.uuid4().hex, range(0, len(value), PART_BYTES)
        parts = [(f"{PART}{name}:{index}", start) for index, start in enumerate(starts)]
        for first in range(0, len(parts), _PARTS_AT_ONCE):

            def write(client: Any, some: list[tuple[str, int]] = parts[first : first + _PARTS_AT_ONCE]) -> None:
                with client.pipeline(transaction=False) as pipeline:
                    for part, start in some:
                        pipeline.set(part, value[start : start + PART_BYTES], px=WRITING_MS)
                    pipeline.execute()

            self._client.ask(f"set {key!r}", write)
        self._put(f"set {key!r}", key, PARTED + f"{name}/{len(parts)}".encode())

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        while True:
            head = self._head(key)
            if head is None or head[:1] != PARTED:
                return _whole(head)
            parts = list(self._parts(f"get {key!r}", head))
            if None not in parts:
                return b"".join(part for part in parts if part is not None)
            if self._head(key) == head:
                raise StoreError(
                    f"store {self.url}: get {key!r}: {parts.count(None)} of its {len(parts)} parts are missing; "
                    "let the server evict nothing (maxmemory-policy noeviction)"
                )

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        keys = [IDENTITY, COUNTER + key, SUM + uuid.uuid4().hex]
        return int(self._client.script(f"add to {key!r}", ADD, keys, [self._identity, amount]))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        keys, channel = [IDENTITY, VALUE + key, COUNTER + key], self._channels + key
        self._client.script(f"delete {key!r}", DELETE, keys, [self._identity, channel])

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`. The server looks at all its keys: not for hot paths."""
        pattern = re.sub(r"([\\*?\[\]^])", r"\\\1", prefix) + "*"

        def scan(client: Any) -> set[str]:
            found = {
                name[len(kind) :].decode()
                for kind in (VALUE, COUNTER)
                for name in client.scan_iter(match=kind + pattern, count=_SCAN)
            }
            self._check(client.get(IDENTITY))
            return found

        return sorted(self._client.ask(f"list {prefix!r}", scan))

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        """See `Store.lease`. The server's clock counts, also while the server is down."""
        check_lease(self.url, key, value, seconds)
        token, keys = os.urandom(TOKEN_BYTES), [IDENTITY, VALUE + key]
        milliseconds = max(1, round(seconds * 1000))
        self._put(f"lease {key!r}", key, LEASED + token + value, milliseconds)
        renewal: list[bytes | str | int] = [self._identity, token, milliseconds]
        release: list[bytes | str | int] = [self._identity, token, self._channels + key]
        return KeyLease(
            self.url,
            key,
            seconds,
            lambda: self._client.script(f"renew {key!r}", RENEW, keys, renewal) == 1,
            lambda: self._client.script(f"release {key!r}", RELEASE, keys, release),
        )

    def watch(self, key: str, known: bytes | None, deadline: Deadline) -> bytes | None:
        """See `Store.watch`. The server tells what changes; it is asked only then, and when a lease may have ended."""
        while (value := self.get(key)) == known and not deadline.expired():
            limit = Deadline.after(min(deadline.remaining(), ASK_AGAIN_SECONDS))
            self._client.ask(f"watch {key!r}", partial(self._wait, key, known, limit), limit.seconds)
        return value

    def close(self) -> None:
        """See `Store.close`. A watch ends within a second."""
        self._client.close()

    def __repr__(self) -> str:
        return f"RedisStore({self.url!r})"

    def _put(self, what: str, key: str, stored: bytes, milliseconds: int = 0) -> None:
        keys, channel = [IDENTITY, VALUE + key], self._channels + key
        self._client.script(what, PUT, keys, [self._identity, channel, stored, milliseconds])

    def _head(self, key: str) -> bytes | None:
        def read(client: Any) -> bytes | None:
            identity, head = client.mget(IDENTITY, VALUE + key)
            self._check(identity)
            return head  # type: ignore[no-any-return]

        return self._client.ask(f"get {key!r}", read)

    def _parts(self, what: str, head: bytes) -> Iterator[bytes | None]:
        name, _, count = head[1:].decode().partition("/")
        names = [f"{PART}{name}:{index}" for index in range(int(count))]
        for first in range(0, len(names), _PARTS_AT_ONCE):
            yield from self._client.ask(what, methodcaller("mget", names[first : first + _PARTS_AT_ONCE]))

    def _wait(self, key: str, known: bytes | None, limit: Deadline, client: Any) -> None:
        """Until `key` is written or its lease may have ended, or the limit; at once when it is no longer `known`."""
        with client.pubsub() as channel:
            channel.subscribe(self._channels + key)
            if not self._client.heard(channel, limit):  # that it listens: changes before that are seen below
                return
            left_ms = client.pttl(VALUE + key)
            if self.get(key) == known:
                end = limit if left_ms < 0 else Deadline.after(min(limit.remaining(), (left_ms + 1) / 1000))
                self._client.heard(channel, end)

    def _check(self, identity: bytes | None) -> None:
        if identity != self._identity:
            raise ValueError(LOST)


def _founded(client: Any) -> bytes:
    """The identity of the database; the first who opens it gives it one."""
    client.set(IDENTITY, uuid.uuid4().hex, nx=True)
    found: bytes = client.get(IDENTITY)
    return found


def _whole(head: bytes | None) -> bytes | None:
    if head is None:
        return None
    return head[1:] if head[:1] == PLAIN else head[1 + TOKEN_BYTES :]
