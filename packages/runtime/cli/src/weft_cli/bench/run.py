"""Running a case: a store, one process per member, and their results."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from itertools import zip_longest
from multiprocessing.connection import Connection, wait
from typing import Any

import msgspec

from weft.errors import DeadlineError, WeftError
from weft.plugins import load
from weft.store_server import serve_store
from weft_cli.bench.members import run_member
from weft_cli.bench.rows import row
from weft_cli.bench.settings import Case, MemberResult, Seat


def run_case(case: Case) -> Mapping[str, Any]:
    """The figures of one case (see `rows.row`). Raises `WeftError` when a member fails or `case.seconds` pass."""
    context = multiprocessing.get_context("spawn")
    results: list[MemberResult] = []
    pending: dict[Connection, Any] = {}
    with serve_store() as server:
        for seat in seats(case):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (msgspec.msgpack.encode(seat), server.url, msgspec.msgpack.encode(case), theirs)
            process = context.Process(target=run_member, args=arguments, name=seat.name)
            process.start()
            theirs.close()
            pending[ours] = process
        try:
            _collect(pending, results, case.seconds)
        finally:
            for process in pending.values():
                process.kill()
    return row(case, sorted(results, key=lambda result: result.name))


def seats(case: Case) -> list[Seat]:
    """The processes of a case."""
    sources, targets = (
        range(load("weft.adapters", name).world_size(sizes)) for name, sizes in (case.source, case.target)
    )
    if case.collocated:
        return [Seat(name=f"rank/{max(s or 0, t or 0)}", source=s, target=t) for s, t in zip_longest(sources, targets)]
    return [
        *(Seat(name=f"source/{rank}", source=rank, target=None) for rank in sources),
        *(Seat(name=f"target/{rank}", source=None, target=rank) for rank in targets),
    ]


def _collect(pending: dict[Connection, Any], results: list[MemberResult], seconds: float) -> None:
    end = time.monotonic() + seconds
    while pending:
        ready = wait(list(pending), max(0.0, end - time.monotonic()))
        if not ready:
            raise DeadlineError("the benchmark", seconds, [process.name for process in pending.values()])
        for connection in ready:
            assert isinstance(connection, Connection)
            process = pending.pop(connection)
            try:
                results.append(msgspec.msgpack.decode(connection.recv_bytes(), type=MemberResult))
            except EOFError:
                for other in pending.values():
                    other.kill()
                raise WeftError(f"{process.name} of the benchmark failed; its own words are above") from None
            process.join(10.0)
