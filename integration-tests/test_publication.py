"""Published versions in real processes over real NIXL and gloo: bytes flow from replica to replica, and relays die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing

import pytest
from support.publication import PINNED, TRAINER, Audience

from weft.deadline import Deadline
from weft.job_store import JobStore
from weft.publication.holders import Directory
from weft.store_server import serve_store
from weft.stores import open_store


@pytest.mark.parametrize("transport", ["nixl", "gloo"])
def test_a_relay_that_is_killed_in_the_middle_is_replaced_and_versions_outlive_their_trainer(transport: str) -> None:
    server = serve_store()
    with Audience(server.url, f"published-{transport}", transport) as audience:
        audience.start(TRAINER, "relay")
        audience.tell(TRAINER, 1)
        assert audience.until("relay", "serves", 1) == ([], TRAINER, 1)

        audience.tell("relay", "halt when bytes leave")
        audience.start("reader")
        audience.until("relay", "gives", 1)
        audience.kill("relay")
        assert audience.until("reader", "serves", 1) == ([], TRAINER, 1)

        audience.kill(TRAINER)
        audience.start("relay")
        assert audience.until("relay", "serves", 1) == ([], "reader", 1)

        audience.start(TRAINER)
        audience.tell(TRAINER, 2)
        ends = [audience.until(name, "serves", 2) for name in ("relay", "reader")]
        assert all(wrong == [] and served == 2 for wrong, _, served in ends)
        assert TRAINER in {holder for _, holder, _ in ends}
    server.close()


def test_a_replica_goes_back_and_a_trainer_that_is_frozen_holds_nothing_until_it_goes_on() -> None:
    server = serve_store()
    store = open_store(server.url, Deadline.after(60))
    directory = Directory(JobStore(store, "kept"))

    def listed() -> list[int]:
        return [each.version for holder in directory.holders() for each in holder.versions()]

    def until(versions: list[int]) -> None:
        Deadline.after(120).wait(lambda: listed() == versions, f"versions {versions}", lambda: [str(listed())], 0.1)

    with closing(store), Audience(server.url, "kept", "nixl", lease_seconds=2.0) as audience:
        audience.start(TRAINER, PINNED)
        for version, there in ((1, [1]), (2, [2, 1]), (3, [3, 2])):
            audience.tell(TRAINER, version)
            until(there)
        for version in (3, 2):
            audience.tell(PINNED, version)
            assert audience.until(PINNED, "serves", version) == ([],)
        audience.tell(PINNED, 1)
        (words,) = audience.until(PINNED, "refused", 1)
        assert "trainer has 3, 2" in words

        audience.signal(TRAINER, signal.SIGSTOP)
        until([])
        audience.signal(TRAINER, signal.SIGCONT)
        until([3, 2])

        job = {"WEFT_STORE": server.url, "WEFT_JOB": "kept", "WEFT_TRANSPORT": "nixl"}
        command = [sys.executable, "-m", "weft_cli.app", "keep", "--retain", "2", "--json"]
        with subprocess.Popen(command, env={**os.environ, **job}, stdout=subprocess.PIPE, text=True) as keeper:
            until([3, 3, 2])
            audience.kill(TRAINER)
            until([3])
            audience.tell(PINNED, 3)
            assert audience.until(PINNED, "serves", 3) == ([],)
            keeper.terminate()
            lines = [json.loads(line) for line in keeper.communicate(timeout=60)[0].splitlines()]
            assert keeper.returncode == 0
        assert [(line.get("version"), line.get("holder")) for line in lines] == [(None, None), (3, TRAINER)]
    server.close()
