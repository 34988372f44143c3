"""Stores that go away and come back: frozen, cut off, started anew, unmounted."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import StoreError
from weft.store_file import FileStore
from weft.store_server import StoreServer, serve_store
from weft.store_tcp import TcpStore
from weft.testing.relay import Relay

SECONDS = 60.0
AWAY_SECONDS = 0.5
"""Far shorter than an operation may take."""
SERVER = (
    "import sys; from weft.store_server import serve_store\n"
    "with serve_store() as server: print(server.url, flush=True); sys.stdin.read()"
)


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(SECONDS)


@contextmanager
def server_process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, and its port."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline().rpartition(":")[2])
        finally:
            process.kill()


def port_of(server: StoreServer) -> int:
    return int(server.url.rpartition(":")[2])


def freeze(pid: int, deadline: Deadline) -> None:
    """SIGSTOP, and wait until every thread has stopped: the signal alone returns before."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks} <= {"T"}

    deadline.wait(stopped, f"process {pid} to stop", lambda: [str(pid)])


def use(store: Store, round: int) -> None:
    """One of every operation, with results that only a store without faults gives."""
    store.set("value", b"%d" % round)
    assert store.get("value") == b"%d" % round
    assert store.add("counter", 1) == round
    assert store.keys("") == ["counter", "value"]
    store.lease("lease", b"1", SECONDS).release()
    assert store.watch("value", b"", Deadline.after(SECONDS)) == b"%d" % round


@pytest.mark.trap(40)
def test_a_frozen_server_is_waited_for_and_then_an_error(deadline: Deadline) -> None:
    with server_process() as (process, port):
        store = TcpStore("127.0.0.1", port, deadline, operation_seconds=SECONDS)
        hasty = TcpStore("127.0.0.1", port, deadline, operation_seconds=0.5)
        use(store, 1)
        freeze(process.pid, deadline)
        with pytest.raises(StoreError, match=f"tcp://127.0.0.1:{port}: get 'a': no answer within 0.5 s: timed out"):
            hasty.get("a")
        threading.Timer(AWAY_SECONDS, process.send_signal, [signal.SIGCONT]).start()
        use(store, 2)
        store.close()
        hasty.close()


def test_a_server_that_comes_back_without_what_it_held_is_an_error(deadline: Deadline) -> None:
    with (
        serve_store() as first,
        serve_store() as second,
        Relay(port_of(first)) as relay,
        ThreadPoolExecutor(1) as pool,
    ):
        store = TcpStore("127.0.0.1", relay.port, deadline, operation_seconds=SECONDS)
        use(store, 1)
        watch = pool.submit(store.watch, "value", b"1", deadline)
        relay.to_port = port_of(second)
        lost = f"tcp://127.0.0.1:{relay.port}: it has lost what it held.*new job name"
        for asked in (lambda: watch.result(SECONDS), lambda: store.get("value"), lambda: store.add("counter", 1)):
            relay.cut()
            with pytest.raises(StoreError, match=lost):
                asked()
        store.close()


def test_every_operation_survives_cut_connections_and_adds_count_once(deadline: Deadline) -> None:
    """The answer to every second request is lost together with its connection."""
    with serve_store() as server, Relay(port_of(server)) as relay:
        store = TcpStore("127.0.0.1", relay.port, deadline, operation_seconds=SECONDS)
        for round in range(1, 20):
            if round % 2:
                relay.lose_next_answer()
            assert store.add("counter", 1) == round
        for cut in range(20, 30):
            relay.cut()
            use(store, cut)
        store.close()


def test_a_watch_goes_on_when_its_connection_was_cut(deadline: Deadline) -> None:
    with serve_store() as server, Relay(port_of(server)) as relay, ThreadPoolExecutor(1) as pool:
        store = TcpStore("127.0.0.1", relay.port, deadline, operation_seconds=SECONDS)
        writer = TcpStore("127.0.0.1", port_of(server), deadline)
        watch = pool.submit(store.watch, "version", None, deadline)
        relay.cut()
        writer.set("version", b"1")
        assert watch.result(SECONDS) == b"1"
        store.close()
        writer.close()


def test_what_answers_but_is_no_store_is_an_error_at_once(deadline: Deadline) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionResetError):
                connection.sendall(b"220 mail.example.org ESMTP at your service\r\n")
                connection.recv(1)

        greeting = pool.submit(greet)
        with pytest.raises(StoreError, match=r"no store of this version of weft: it says b'220 mail"):
            TcpStore("127.0.0.1", listener.getsockname()[1], deadline)
        greeting.result(SECONDS)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 64,
        (9).to_bytes(8, "big") + b"\xc1" * 9,
        (2).to_bytes(8, "big") + b"\x92\x01",
    ],
    ids=["http", "lengths", "garbage", "schema"],
)
def test_a_server_leaves_whoever_says_what_no_client_says(said: bytes, deadline: Deadline) -> None:
    with serve_store() as server:
        port = port_of(server)
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as stranger:
            stranger.sendall(said)
            while stranger.recv(1024):
                pass
        store = TcpStore("127.0.0.1", port, deadline)
        use(store, 1)
        store.close()


def test_a_directory_that_is_away_is_waited_for(tmp_path: Path, deadline: Deadline) -> None:
    here, away = tmp_path / "store", tmp_path / "away"
    store = FileStore(str(here), deadline, operation_seconds=SECONDS)
    hasty = FileStore(str(here), deadline, operation_seconds=0.2)
    use(store, 1)
    for round in range(2, 5):
        here.rename(away)
        with pytest.raises(StoreError, match=r"file://.*/store: get 'value': no answer within 0\.2 s: .*mounted"):
            hasty.get("value")
        threading.Timer(AWAY_SECONDS, away.rename, [here]).start()
        use(store, round)
        assert not away.exists()


def test_another_directory_in_the_place_of_the_store_is_an_error(tmp_path: Path, deadline: Deadline) -> None:
    here = tmp_path / "store"
    store = FileStore(str(here), deadline)
    use(store, 1)
    here.rename(tmp_path / "away")
    FileStore(str(here), deadline)
    for asked in (lambda: store.get("value"), lambda: store.set("value", b"2"), lambda: store.keys("")):
        with pytest.raises(StoreError, match="it has lost what it held: another directory"):
            asked()
    assert [path.name for path in here.iterdir()] == ["identity.store"]
