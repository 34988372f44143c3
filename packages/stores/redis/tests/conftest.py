"""Real Redis servers on this machine."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from weft.deadline import Deadline

SECONDS = 60.0
USER, PASSWORD = "weft-user", "s3cr&t/wörd:@%"


def free_port() -> int:
    """One below those that the system gives out: nobody else gets it while the server is killed and started again."""
    for port in random.sample(range(10_000, 32_768), 1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("a thousand ports are taken")


class Server:
    """A Redis server that writes everything down before it answers, and takes no string over 1 MiB.

    The default user needs no password; `USER` has `PASSWORD`.
    """

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server")
        assert binary, "these tests need a Redis server: apt-get install redis-server"
        self.port = free_port()
        self._folder = folder
        self._command = [
            binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
            "--appendonly", "yes", "--appendfsync", "no", "--proto-max-bulk-len", "1mb",
        ]  # fmt: skip
        self.process = self._started()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/3"

    @property
    def url_with_password(self) -> str:
        return f"redis://{quote(USER, safe='')}:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/3"

    def client(self) -> redis.Redis:
        """Somebody else's connection to the database of `url`."""
        return redis.Redis(port=self.port, db=3, protocol=2, retry=Retry(NoBackoff(), 0))

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(SECONDS)

    def start_again(self) -> None:
        """On the same port and data."""
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=log)

        def answers() -> bool:
            assert process.poll() is None, (self._folder / "log").read_text()
            try:
                with self.client() as client:
                    return bool(client.ping())
            except redis.ConnectionError:
                return False

        Deadline.after(SECONDS).wait(answers, "the Redis server's start", list)
        with self.client() as client:
            user = ["ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~weft:*", "&weft:*", "+@all"]
            client.execute_command(*user)
        return process


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """Empty."""
    if shared_server.process.poll() is not None:
        shared_server.start_again()
    with shared_server.client() as client:
        client.flushall()
    return shared_server
