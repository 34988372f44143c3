"""Servers that go away, lose what they held, refuse, or are none; and passwords, which nobody sees."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import ConfigError, StoreError
from weft.stores import open_store
from weft.testing.relay import Relay
from weft_redis import Address, RedisStore
from weft_redis.scripts import PART, READING_MS, WRITING_MS
from weft_redis.store import PART_BYTES

SECONDS = 60.0
AWAY_SECONDS = 0.5
"""Far shorter than an operation may take."""
SECRET = "n0t/for:your@eyes"
QUOTED = "n0t%2Ffor%3Ayour%40eyes"


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(SECONDS)


@pytest.fixture
def store(server: Any, deadline: Deadline) -> Iterator[RedisStore]:
    store = RedisStore(Address.parse(server.url), deadline, operation_seconds=SECONDS)
    yield store
    store.close()


def use(store: Store, round: int) -> None:
    """One of every operation, with results that only a store without faults gives."""
    large = b"%d" % round * PART_BYTES * 2
    store.set("value", b"%d" % round)
    store.set("large", large)
    assert store.get("value") == b"%d" % round
    assert (store.get("large") == large) is True
    assert store.add("counter", 1) == round
    assert store.keys("") == ["counter", "large", "value"]
    store.lease("lease", b"1", SECONDS).release()
    assert store.watch("value", b"", Deadline.after(SECONDS)) == b"%d" % round


def test_a_server_that_is_killed_and_started_again_on_its_data_is_waited_for(
    server: Any, store: RedisStore, deadline: Deadline
) -> None:
    use(store, 1)
    lease = store.lease("member", b"alive", SECONDS)
    with ThreadPoolExecutor(2) as pool:
        watch = pool.submit(store.watch, "version", None, deadline)
        server.kill()
        addition = pool.submit(store.add, "counter", 1)
        server.start_again()
        assert addition.result(SECONDS) == 2
        assert store.get("value") == b"1"
        lease.renew()
        assert store.get("member") == b"alive"
        lease.release()
        store.set("version", b"2")
        assert watch.result(SECONDS) == b"2"


@pytest.mark.trap(40)
def test_a_frozen_server_is_waited_for_and_then_an_error(server: Any, store: RedisStore, deadline: Deadline) -> None:
    hasty = RedisStore(Address.parse(server.url), deadline, operation_seconds=0.5)
    use(store, 1)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreError, match=f"{server.url}: get 'a': no answer within 0.5 s: "):
            hasty.get("a")
    finally:
        threading.Timer(AWAY_SECONDS, os.kill, [server.process.pid, signal.SIGCONT]).start()
    use(store, 2)
    hasty.close()


def test_every_operation_survives_cut_connections_and_adds_count_once(server: Any, deadline: Deadline) -> None:
    with Relay(server.port) as relay:
        store = RedisStore(Address("127.0.0.1", relay.port, 3, tls=False), deadline, operation_seconds=SECONDS)
        for round in range(1, 20):
            if round % 2:
                relay.lose_next_answer()
            assert store.add("counter", 1) == round
        for round in range(20, 30):
            relay.cut()
            use(store, round)
        with ThreadPoolExecutor(1) as pool:
            watch = pool.submit(store.watch, "version", None, deadline)
            relay.cut()
            store.set("version", b"1")
            assert watch.result(SECONDS) == b"1"
        store.close()


def test_a_database_that_was_emptied_is_an_error_and_not_an_empty_store(server: Any, store: RedisStore) -> None:
    use(store, 1)
    lease = store.lease("member", b"alive", SECONDS)
    with server.client() as other:
        other.flushdb()
    asked: list[Callable[[], object]] = [
        lambda: store.get("value"),
        lambda: store.set("value", b"2"),
        lambda: store.set("value", b"2" * PART_BYTES * 2),
        lambda: store.add("counter", 1),
        lambda: store.delete("value"),
        lambda: store.keys(""),
        lambda: store.lease("lease", b"", 1.0),
        lambda: store.watch("value", b"1", Deadline.after(SECONDS)),
        lease.renew,
        lease.release,
    ]
    for ask in asked:
        with pytest.raises(StoreError, match=f"{server.url}: it has lost what it held.*new job name"):
            ask()


def test_values_over_the_servers_limit_travel_in_parts_that_do_not_stay(server: Any, store: RedisStore) -> None:
    with server.client() as other:
        with pytest.raises(redis.RedisError):
            other.set("one string", b"x" * (PART_BYTES + 100))
        for size_bytes in (PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES):
            store.set("value", b"x" * size_bytes)
            assert store.get("value") == b"x" * size_bytes
            assert len(other.keys(PART + "*")) == (0 if size_bytes == PART_BYTES else -(-size_bytes // PART_BYTES))
            assert {other.pttl(part) for part in other.keys(PART + "*")} <= {-1}
            store.delete("value")
            assert all(0 < other.pttl(part) <= READING_MS for part in other.keys(PART + "*"))
            other.delete(*other.keys(PART + "*"), "nothing")
        store.set("value", b"x" * 2 * PART_BYTES)
        store.set("value", b"small")
        left = other.keys(PART + "*")
        assert len(left) == 2
        assert all(0 < other.pttl(part) <= READING_MS for part in left)


def test_a_writer_that_dies_between_parts_leaves_the_old_value_and_nothing_that_stays(
    server: Any, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set("value", b"old")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(store, "_put", die)
        with pytest.raises(KeyboardInterrupt):
            store.set("value", b"x" * 3 * PART_BYTES)
    assert store.get("value") == b"old"
    with server.client() as other:
        assert len(other.keys(PART + "*")) == 3
        assert all(0 < other.pttl(part) <= WRITING_MS for part in other.keys(PART + "*"))


def test_missing_parts_are_an_error_and_not_a_shorter_value(server: Any, store: RedisStore) -> None:
    store.set("value", b"x" * 3 * PART_BYTES)
    with server.client() as other:
        other.delete(other.keys(PART + "*:1")[0])
    with pytest.raises(StoreError, match=r"get 'value': 1 of its 3 parts are missing; .*noeviction"):
        store.get("value")


def test_a_watch_asks_the_server_only_when_something_may_have_changed(server: Any, store: RedisStore) -> None:
    store.set("version", b"1")
    with server.client() as other:
        before = other.info("stats")["total_commands_processed"]
        assert store.watch("version", b"1", Deadline.after(1.5)) == b"1"
        assert other.info("stats")["total_commands_processed"] - before < 20


def test_a_full_server_says_what_to_do(server: Any, store: RedisStore) -> None:
    with server.client() as other:
        try:
            other.config_set("maxmemory", "1")
            with pytest.raises(StoreError, match=r"set 'value': .*; give the server more memory \(maxmemory\)"):
                store.set("value", b"1")
        finally:
            other.config_set("maxmemory", "0")
    use(store, 1)


def said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("user", ["weft-user", ""])
def test_a_wrong_password_is_an_error_at_once_that_does_not_show_it(
    server: Any, user: str, caplog: pytest.LogCaptureFixture, deadline: Deadline
) -> None:
    caplog.set_level(logging.DEBUG)
    with server.client() as other:
        try:
            other.config_set("requirepass", "another")
            with pytest.raises(StoreError, match=f":{server.port}/3: open: .*; correct user and password") as caught:
                open_store(f"redis://{user}:{QUOTED}@127.0.0.1:{server.port}/3", deadline)
        finally:
            other.config_set("requirepass", "")
    heard = said(caught.value) + caplog.text
    assert SECRET not in heard
    assert QUOTED not in heard


def test_a_user_without_rights_is_told_which_it_needs(server: Any, deadline: Deadline) -> None:
    with server.client() as other:
        other.execute_command("ACL", "SETUSER", "guest", "on", f">{SECRET}", "~weft:*", "+get")
    with pytest.raises(StoreError, match=r"open: .*permission.*keys and channels weft:\*") as caught:
        open_store(f"redis://guest:{QUOTED}@127.0.0.1:{server.port}/3", deadline)
    assert SECRET not in said(caught.value)


def test_nothing_that_a_store_shows_has_the_password_in_it(server: Any, deadline: Deadline) -> None:
    with server.client() as other:
        other.execute_command("ACL", "SETUSER", "member", "on", f">{SECRET}", "~weft:*", "&weft:*", "+@all")
    url = f"redis://member:{QUOTED}@127.0.0.1:{server.port}/3"
    store = open_store(url, deadline)
    assert repr(store) == f"RedisStore('redis://127.0.0.1:{server.port}/3')"
    assert SECRET not in repr(Address.parse(url)) + repr(store.lease("member", b"", 1.0))
    store.close()
    with pytest.raises(StoreError, match="closed") as caught:
        store.get("a")
    assert SECRET not in said(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://member:{QUOTED}@",
        f"redis://member:{QUOTED}@h:port",
        f"redis://member:{QUOTED}@h:99999",
        f"redis://member:{QUOTED}@h:0",
        f"redis://member:{SECRET}@h/x",
        f"redis://member:{QUOTED}@h/1?db=2",
        f"redis://member:{QUOTED}@h/1#2",
        f"redis:member:{QUOTED}@h",
    ],
)
def test_what_is_no_address_is_refused_without_showing_the_password(url: str, deadline: Deadline) -> None:
    with pytest.raises(ConfigError, match="store: expected") as caught:
        open_store(url, deadline)
    heard = said(caught.value)
    assert "member" not in heard.partition("Error: ")[2]
    assert SECRET not in heard
    assert QUOTED not in heard


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address("h", 6379, 0, tls=False)),
        ("rediss://h:1/2", Address("h", 1, 2, tls=True)),
        ("redis://[::1]:7/", Address("::1", 7, 0, tls=False)),
        (f"redis://me:{QUOTED}@h", Address("h", 6379, 0, tls=False, user="me", password=SECRET)),
        (f"redis://:{QUOTED}@h", Address("h", 6379, 0, tls=False, password=SECRET)),
    ],
)
def test_addresses_are_read(url: str, address: Address) -> None:
    assert Address.parse(url) == address
    assert Address.parse(address.url).host == address.host


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"weft-store 1\n", b"\xff" * 40 + b"\r\n"])
def test_a_server_that_is_not_redis_is_an_error_that_names_it(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(1)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(StoreError, match=f"redis://127.0.0.1:{port}/0: open: .*Redis server"):
            open_store(f"redis://127.0.0.1:{port}", Deadline.after(1.0))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)


@pytest.mark.trap(40)
def test_nobody_there_and_nobody_who_answers_are_errors_by_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(StoreError, match=rf"redis://127.0.0.1:{port}/0: open: no answer within 0\.\d s: Timeout"):
            open_store(f"redis://127.0.0.1:{port}", Deadline.after(0.5))
    with pytest.raises(StoreError, match=rf"redis://127.0.0.1:{port}/0: open: no answer within 0\.\d s: .*refused"):
        open_store(f"redis://127.0.0.1:{port}", Deadline.after(0.5))
