"""The processes of a benchmark: started together, waited for, ended whatever happens."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from weft.errors import DeadlineError, WeftError

Entry = Callable[[bytes, str, bytes, Connection], None]
"""A function of a module's top level: who it is, the store's URL, what is measured, and where its answer goes."""


def run_processes(entry: Entry, url: str, seats: Mapping[str, bytes], what: bytes, seconds: float) -> dict[str, bytes]:
    """What each seat's process answers, by name. Raises `WeftError` when one fails, `DeadlineError` after `seconds`."""
    context = multiprocessing.get_context("spawn")
    pending: dict[Connection, Any] = {}
    answers: dict[str, bytes] = {}
    try:
        for name, seat in seats.items():
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=entry, args=(seat, url, what, theirs), name=name)
            process.start()
            theirs.close()
            pending[ours] = process
        end = time.monotonic() + seconds
        while pending:
            ready = wait(list(pending), max(0.0, end - time.monotonic()))
            if not ready:
                raise DeadlineError("the benchmark", seconds, [process.name for process in pending.values()])
            for connection in ready:
                assert isinstance(connection, Connection)
                process = pending.pop(connection)
                try:
                    answers[process.name] = connection.recv_bytes()
                except EOFError:
                    raise WeftError(f"{process.name} of the benchmark failed; its own words are above") from None
                process.join(10.0)
    finally:
        for process in pending.values():
            process.kill()
    return answers
