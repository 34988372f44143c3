"""Running a function in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from weft.errors import DeadlineError, WeftError


def in_own_process(function: Callable[[bytes], bytes], argument: bytes, seconds: float) -> bytes:
    """What `function` (of a module's top level) makes of `argument` in a fresh interpreter.

    Raises `DeadlineError` after `seconds`, `WeftError` when the process fails; its own words are on standard error.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, argument, theirs), name=function.__name__)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise DeadlineError(f"the benchmark {function.__name__}", seconds, [])
        return ours.recv_bytes()
    except EOFError:
        raise WeftError(f"{function.__name__} of the benchmark failed; its own words are above") from None
    finally:
        process.kill()
        process.join()


def rss_bytes() -> tuple[int, int]:
    """Memory of this process: now, and the most it has had at once (Linux only)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    sizes = {line[0]: int(line[1]) * 1024 for line in lines if line and line[0] in ("VmRSS:", "VmHWM:")}
    return sizes["VmRSS:"], sizes["VmHWM:"]


def forget_peak() -> None:
    """Let the most memory that `rss_bytes` tells begin with what there is now (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")


def _answer(function: Callable[[bytes], bytes], argument: bytes, connection: Connection) -> None:
    connection.send_bytes(function(argument))
