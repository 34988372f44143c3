"""Running a case: a store, one process per member, and their results."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import msgspec

from weft.errors import DeadlineError, WeftError
from weft.plugins import load
from weft.store_server import serve_store
from weft_cli.bench.members import run_member
from weft_cli.bench.settings import Case, MemberResult, row


def run_case(case: Case) -> Mapping[str, Any]:
    """The figures of one case (see `settings.row`). Raises `WeftError` when a member fails or `case.seconds` pass."""
    worlds = {
        role: load("weft.adapters", framework).world_size(parallel)
        for role, (framework, parallel) in (("source", case.source), ("target", case.target))
    }
    context = multiprocessing.get_context("spawn")
    results: dict[str, list[MemberResult]] = {role: [] for role in worlds}
    pending: dict[Connection, tuple[str, Any]] = {}
    with serve_store() as server:
        for role, world in worlds.items():
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (role, rank, server.url, msgspec.msgpack.encode(case), theirs)
                process = context.Process(target=run_member, args=arguments, name=f"{role}/{rank}")
                process.start()
                theirs.close()
                pending[ours] = (role, process)
        try:
            _collect(pending, results, case.seconds)
        finally:
            for _, process in pending.values():
                process.kill()
    return row(case, results["source"], results["target"])


def _collect(
    pending: dict[Connection, tuple[str, Any]], results: dict[str, list[MemberResult]], seconds: float
) -> None:
    end = time.monotonic() + seconds
    while pending:
        ready = wait(list(pending), max(0.0, end - time.monotonic()))
        if not ready:
            raise DeadlineError("the benchmark", seconds, [process.name for _, process in pending.values()])
        for connection in ready:
            assert isinstance(connection, Connection)
            role, process = pending.pop(connection)
            try:
                results[role].append(msgspec.msgpack.decode(connection.recv_bytes(), type=MemberResult))
            except EOFError:
                for _, other in pending.values():
                    other.kill()
                raise WeftError(f"{process.name} of the benchmark failed; its own words are above") from None
            process.join(10.0)
