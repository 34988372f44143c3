"""Both built-in stores pass the conformance suite; what differs between them is tested here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft.content import get_content, put_content
from weft.deadline import Deadline
from weft.errors import ConfigError, PluginError, RecordError, StoreError
from weft.store_file import FileStore
from weft.store_server import serve_store
from weft.store_tcp import LIMIT_BYTES, TcpStore
from weft.stores import open_store
from weft.testing.stores import StoreSuite

SECONDS = 30.0


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(SECONDS)


class TestTcpStore(StoreSuite):
    @pytest.fixture
    def url(self) -> Iterator[str]:
        with serve_store() as server:
            yield server.url

    def test_parts_of_replaced_and_deleted_values_do_not_stay(self, store: TcpStore) -> None:
        store.set("value", b"x" * 9_000_000)
        store.set("value", b"y" * 9_000_000)
        store.set("value", b"small")
        store.set("other", b"z" * 9_000_000)
        store.delete("other")
        assert store._client.list_keys() == ["vvalue"]

    def test_values_above_the_limit_are_refused(self, store: TcpStore, monkeypatch: pytest.MonkeyPatch) -> None:
        assert LIMIT_BYTES > 64 << 20
        monkeypatch.setattr("weft.store_tcp.LIMIT_BYTES", 10)
        with pytest.raises(StoreError, match="at most 10 bytes, found 11"):
            store.set("value", b"x" * 11)


class TestFileStore(StoreSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/a%20store/deeper"

    def test_writes_leave_no_temporary_files(self, store: FileStore, tmp_path: Path) -> None:
        store.set("a/b", b"1")
        store.add("c", 1)
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a%2Fb.value", "c.counter"]


@pytest.mark.trap(49)
def test_two_servers_take_two_free_ports_and_share_nothing(deadline: Deadline) -> None:
    with serve_store() as first, serve_store() as second:
        assert first.url != second.url
        one, two = open_store(first.url, deadline), open_store(second.url, deadline)
        one.set("a", b"1")
        assert two.get("a") is None
        one.close()
        two.close()


@pytest.mark.trap(49)
def test_a_server_listens_on_its_own_address_only() -> None:
    with serve_store("127.0.0.1") as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=SECONDS):
            pass


@pytest.mark.trap(49)
@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_a_wildcard_address_is_refused_because_no_member_could_use_it(host: str) -> None:
    with pytest.raises(ConfigError, match="the address that members connect to"):
        serve_store(host)


def test_a_port_in_use_is_an_error_that_names_it() -> None:
    with serve_store() as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(StoreError, match=f"127.0.0.1:{port}"):
            serve_store(port=port)


def test_a_server_closes_twice_and_says_so() -> None:
    server = serve_store()
    server.close()
    server.close()
    assert repr(server) == f"StoreServer('{server.url}', closed)"


def test_clients_of_a_closed_server_fail_naming_its_address(deadline: Deadline) -> None:
    server = serve_store()
    store = open_store(server.url, deadline)
    store.set("a", b"1")
    server.close()
    with pytest.raises(StoreError, match=server.url):
        store.set("a", b"2")
    store.close()


@pytest.mark.trap(40)
def test_an_unreachable_server_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(StoreError, match=f"tcp://127.0.0.1:{port}: not reached within 0.3 s"):
        open_store(f"tcp://127.0.0.1:{port}", Deadline.after(0.3))
    with pytest.raises(StoreError, match=r"tcp://no-such-host\.invalid:1: not reached"):
        open_store("tcp://no-such-host.invalid:1", Deadline.after(0.3))


@pytest.mark.trap(40)
def test_a_listener_that_never_answers_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(StoreError, match=rf"tcp://127.0.0.1:{port}: .*no answer"):
            open_store(f"tcp://127.0.0.1:{port}", Deadline.after(0.5))


def stop(pid: int, deadline: Deadline) -> None:
    """SIGSTOP, and wait until every thread has stopped: the signal alone returns before."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        states = [
            (task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()
        ]
        return set(states) <= {"T"}

    deadline.wait(stopped, f"process {pid} to stop", lambda: [str(pid)])


@pytest.mark.trap(40)
def test_a_frozen_server_ends_in_an_error_and_not_in_a_wait(deadline: Deadline) -> None:
    script = (
        "import sys; from weft.store_server import serve_store\n"
        "with serve_store() as server: print(server.url, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            store = TcpStore("127.0.0.1", int(url.rpartition(":")[2]), deadline, operation_seconds=0.5)
            store.set("a", b"1")
            stop(process.pid, deadline)
            with pytest.raises(StoreError, match=f"{url}: get 'a': no answer within 0.5 s"):
                store.get("a")
            with pytest.raises(StoreError, match="open the store again"):
                store.get("a")
        finally:
            process.kill()


@pytest.mark.trap(40)
def test_a_counter_whose_lock_is_held_ends_in_an_error(tmp_path: Path, deadline: Deadline) -> None:
    store = FileStore(str(tmp_path), deadline, operation_seconds=0.2)
    store.add("counter", 1)
    holder = (
        f"import fcntl, sys; file = open({str(tmp_path / 'counter.counter')!r}); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StoreError, match=r"counter\.counter.*0\.2 s"):
            store.add("counter", 1)
        process.communicate("")
    assert store.add("counter", 1) == 2


def test_a_directory_that_cannot_be_is_an_error_that_names_it(tmp_path: Path, deadline: Deadline) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=f"file://{tmp_path}/file/store"):
        open_store(f"file://{tmp_path}/file/store", deadline)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:5",
        "tcp:127.0.0.1",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:0",
        "tcp://h:99999",
        "file://host/x",
        "file:///",
        "file://x",
    ],
)
def test_what_is_not_a_store_url_is_refused_with_an_example(url: str, deadline: Deadline) -> None:
    with pytest.raises(ConfigError, match=r"expected|Port"):
        open_store(url, deadline)


def test_a_scheme_that_nobody_serves_says_what_to_install(deadline: Deadline) -> None:
    with pytest.raises(PluginError, match="weft-redis"):
        open_store("redis://127.0.0.1:6379", deadline)


def test_content_is_published_once_and_verified_when_read(tmp_path: Path, deadline: Deadline) -> None:
    store = FileStore(str(tmp_path), deadline)
    address = put_content(store, "layout", b"bytes")
    assert get_content(store, "layout", address) == b"bytes"
    store.set(f"layout/{address}/bytes", b"other bytes")
    assert put_content(store, "layout", b"bytes") == address
    with pytest.raises(RecordError, match=address):
        get_content(store, "layout", address)
    with pytest.raises(RecordError, match="found nothing"):
        get_content(store, "elsewhere", address)
