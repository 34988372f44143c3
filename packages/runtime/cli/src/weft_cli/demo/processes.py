"""Child processes: started in sessions of their own, spoken to under deadlines, named when they fail, always ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from weft.deadline import Deadline
from weft.errors import DeadlineError
from weft_cli.demo.channel import Channel, Reply, child_environment
from weft_cli.demo.sessions import end_session, members_of, shared_memory_of

_TAIL_LINES = 25
_STOP_SECONDS = 15.0
_PATIENCE_SECONDS = 4.0


class ChildError(RuntimeError):
    """A child died or did not answer in time; the message names it and shows the end of its log."""


class Child:
    """One process with a channel and a log file. Its descendants share its session."""

    def __init__(self, name: str, module: str, log: Path, environment: Mapping[str, str]) -> None:
        self.name, self._log = name, log
        mine, theirs = socket.socketpair()
        with theirs, log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", module],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**os.environ, **environment, **child_environment(theirs)},
            )
        self._channel = Channel(mine)
        self._shared: set[str] = set()

    def send(self, do: str, **arguments: Any) -> None:
        """Give a command; its answer is fetched with `answers`."""
        try:
            self._channel.send({"do": do, **arguments})
        except OSError as error:
            raise self.failure(f"does not take commands any more ({error})") from error

    def fileno(self) -> int:
        """For `select`."""
        return self._channel.socket.fileno()

    def take(self) -> Reply | None:
        """One answer if a whole one has come. Raises `ChildError` when the child is gone."""
        try:
            return self._channel.receive()
        except (OSError, EOFError) as error:
            try:
                code: int | str = self.process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                code = "none yet"
            raise self.failure(f"died (exit code {code})") from error

    def failure(self, what: str) -> ChildError:
        """An error that names this child and shows the end of its log."""
        lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return ChildError(
            "\n".join([f"{self.name} {what}; the last lines of its log:", *(f"  | {line}" for line in lines)])
        )

    def note_shared_memory(self) -> None:
        """Remember what its session shares now, since a process that has ended can no longer be asked.

        vLLM's workers on CPU leave some behind even when they end in peace.
        """
        self._shared |= shared_memory_of(self.process.pid)

    def request_stop(self) -> None:
        """Ask it to end by itself; silence is fine, `end` follows."""
        try:
            self._channel.send({"do": "stop"})
        except OSError:
            return

    def end(self, deadline: Deadline) -> None:
        """Wait until `deadline` for it to end by itself, then end its whole session. Idempotent."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(deadline.remaining())
        end_session(self.process.pid, _PATIENCE_SECONDS, self._shared)
        self._channel.socket.close()
        self.process.wait(_PATIENCE_SECONDS)


def answers(children: Sequence[Child], seconds: float, what: str) -> list[Reply]:
    """One answer of every child, in order. Raises `ChildError` at the first that fails, or naming all who are late."""
    deadline = Deadline.after(seconds)
    found: dict[str, Reply] = {}
    while len(found) < len(children):
        waiting = [child for child in children if child.name not in found]
        ready, _, _ = select.select(waiting, [], [], deadline.remaining())
        if not ready:
            late = DeadlineError(what, seconds, [child.name for child in waiting])
            raise waiting[0].failure(f"is late: {late}")
        for child in ready:
            answer = child.take()
            if answer is not None:
                found[child.name] = answer
    return [found[child.name] for child in children]


def ask(children: Sequence[Child], seconds: float, do: str, **arguments: Any) -> list[Reply]:
    """Give every child the same command and collect the answers."""
    for child in children:
        child.send(do, **arguments)
    return answers(children, seconds, do)


class Family:
    """All children of one run; leaving the context ends every one of them and what they started, whatever happened."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []
        self._finished = False

    def start(self, name: str, module: str, environment: Mapping[str, str]) -> Child:
        """Start `python -m module` as `name`, logging to `<logs>/<name>.log`."""
        child = Child(name, module, self._logs / f"{name.replace('/', '-')}.log", environment)
        self._children.append(child)
        return child

    def note_shared_memory(self) -> None:
        """Remember what every child's session shares, to remove it at the end. Call it once children are up."""
        for child in self._children:
            child.note_shared_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not leave behind what the first one began to end; ending is bounded.
        handlers = {
            number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        # After a failure children may be in the middle of anything and would not read a request to stop.
        deadline = Deadline.after(_STOP_SECONDS if kind is None else 0.0)
        try:
            self.note_shared_memory()
            for child in self._children:
                child.request_stop()
            for child in self._children:
                child.end(deadline)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        left = [child.name for child in self._children if members_of(child.process.pid)]
        if left:
            raise ChildError(f"could not be ended: {', '.join(left)}")
