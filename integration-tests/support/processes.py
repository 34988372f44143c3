"""Running a function in several fresh processes, under a deadline, and leaving none behind."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, seconds: float = 240.0) -> list[Any]:
    """Call `function(rank, world, *arguments)` in `world` spawned processes; return what they return, in rank order.

    `function` must be importable in the child. Raises `AssertionError` with the tracebacks of all ranks that failed,
    or the names of those that were late; every process is gone when this returns.
    """
    context = multiprocessing.get_context("spawn")
    until = time.monotonic() + seconds
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=_call, args=(function, rank, world, arguments, writer), daemon=True)
        for rank, (_, writer) in enumerate(pipes)
    ]
    try:
        for process, (_, writer) in zip(ranks, pipes, strict=True):
            process.start()
            writer.close()
        answers = [_answer(reader, until) for reader, _ in pipes]
        for process in ranks:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()
        for reader, _ in pipes:
            reader.close()
    faults = [f"rank {rank}: {answer[1]}" for rank, answer in enumerate(answers) if not answer[0]]
    assert not faults, "\n".join(faults)
    return [answer[1] for answer in answers]


def _answer(reader: Connection, until: float) -> tuple[bool, Any]:
    if not reader.poll(max(0.0, until - time.monotonic())):
        return False, "no answer within the deadline"
    try:
        answer: tuple[bool, Any] = reader.recv()
    except EOFError:
        return False, "the process ended without an answer"
    return answer


def _call(function: Callable[..., Any], rank: int, world: int, arguments: tuple[Any, ...], writer: Connection) -> None:
    try:
        answer = (True, function(rank, world, *arguments))
    except Exception:  # noqa: BLE001 - it is reported to the parent, whatever it is
        answer = (False, traceback.format_exc())
    writer.send(answer)
    writer.close()
