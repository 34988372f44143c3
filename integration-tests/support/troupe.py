"""Processes that a test starts, talks to over pipes, strikes and ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Self


class Troupe:
    """A context manager that leaves none behind. Every process has a name, which others may have had before."""

    def __init__(self, method: str, preload: Sequence[str] = ()) -> None:
        """`method` is `multiprocessing`'s; `preload`, for "forkserver", is what takes long to import."""
        self._context: Any = multiprocessing.get_context(method)
        if preload:
            self._context.set_forkserver_preload(list(preload))
        self._pipes: dict[str, Connection] = {}
        self._processes: dict[str, Any] = {}
        self.said: dict[str, list[tuple[Any, ...]]] = {}
        """By name, what was heard of the one that has it now, in order."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.kill(name)

    def begin(self, name: str, play: Callable[..., None], *arguments: Any) -> None:
        """Start a process that calls `play(*arguments, pipe)`."""
        self._pipes[name], far = self._context.Pipe()
        self._processes[name] = self._context.Process(target=play, args=(*arguments, far), daemon=True)
        self._processes[name].start()
        far.close()
        self.said[name] = []

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._processes[name].kill()
        self._processes.pop(name).join(10)
        self._pipes[name].close()

    def freeze(self, name: str) -> None:
        """SIGSTOP."""
        os.kill(self._processes[name].pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        os.kill(self._processes[name].pid, signal.SIGCONT)

    def tell(self, name: str, *what: Any) -> None:
        """Send to a process."""
        self._pipes[name].send(what)

    def until(self, name: str, *what: object, seconds: float = 120.0) -> tuple[Any, ...]:
        """Wait for a process to say something that begins so; what it said before is in `said` alone."""
        limit = time.monotonic() + seconds
        while True:
            assert self._pipes[name].poll(max(0.0, limit - time.monotonic())), f"{name} never said {what}: {self.said}"
            said: tuple[Any, ...] = self._pipes[name].recv()
            self.said[name].append(said)
            if said[: len(what)] == what:
                return said

    def hear(self, name: str) -> None:
        """Take in what a process has said by now."""
        while self._pipes[name].poll():
            self.said[name].append(self._pipes[name].recv())
