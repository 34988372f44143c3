"""Both built-in stores pass the conformance suite; what differs between them is tested here."""

from __future__ import annotations

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

    def test_values_above_the_limit_are_refused(self, store: TcpStore, monkeypatch: pytest.MonkeyPatch) -> None:
        assert LIMIT_BYTES > 64 << 20
        monkeypatch.setattr("weft.store_tcp.LIMIT_BYTES", 10)
        with pytest.raises(StoreError, match="at most 10 bytes, found 11"):
            store.set("value", b"x" * 11)

    def test_sums_of_more_than_64_bits_are_refused_and_change_nothing(self, store: TcpStore) -> None:
        store.add("counter", (1 << 63) - 1)
        with pytest.raises(StoreError, match=f"add to 'counter': expected sums of 64 bits, found {1 << 63}"):
            store.add("counter", 1)
        assert store.add("counter", 0) == (1 << 63) - 1


class TestFileStore(StoreSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/a%20store/deeper"

    def test_writes_leave_no_temporary_files(self, store: FileStore, tmp_path: Path) -> None:
        store.set("a/b", b"1")
        store.add("c", 1)
        kept = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert kept == {"a%2Fb.value", "c.counter", "identity.store"}


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
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{server.url}: set 'a': its server is closed"):
            store.set("a", b"2")
    store.close()


@pytest.mark.trap(40)
def test_an_unreachable_server_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    tried = rf"tcp://127.0.0.1:{port}: open: no answer within 0\.\d s: .*refused; is its server running"
    with pytest.raises(StoreError, match=tried):
        open_store(f"tcp://127.0.0.1:{port}", Deadline.after(0.3))
    with pytest.raises(StoreError, match=r"tcp://no-such-host\.invalid:1: open: no answer"):
        open_store("tcp://no-such-host.invalid:1", Deadline.after(0.3))


@pytest.mark.trap(40)
def test_a_listener_that_never_answers_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(StoreError, match=rf"tcp://127.0.0.1:{port}: .*no answer"):
            open_store(f"tcp://127.0.0.1:{port}", Deadline.after(0.5))


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
    with pytest.raises(PluginError, match="weft-zookeeper"):
        open_store("zookeeper://127.0.0.1:2181", deadline)


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
