"""Ending a whole session of processes, and the shared memory that it leaves. Reads Linux's /proc."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_SHARED = "/dev/shm/"
_POLL_SECONDS = 0.05


def members_of(session: int) -> list[int]:
    """Process ids in a session, without zombies."""
    return [process for process, state, own in _processes() if own == session and state != "Z"]


def shared_memory_of(session: int) -> set[str]:
    """Paths under /dev/shm that processes of the session have mapped or open."""
    return {path for process in members_of(session) for path in _shared_of(process)}


def end_session(session: int, patience_seconds: float, known: Iterable[str] = ()) -> None:
    """Terminate every process of a session, after `patience_seconds` kill them, and unlink their shared memory.

    A process that is killed cannot unlink what it shares, and nor can the tracker killed with it. Only what this
    user owns and the session had mapped is removed: now, or earlier as `known` says.
    """
    shared = {*known, *shared_memory_of(session)}
    for number, seconds in ((signal.SIGTERM, patience_seconds), (signal.SIGKILL, patience_seconds)):
        _signal_all(session, number)
        until = time.monotonic() + seconds
        while members_of(session) and time.monotonic() < until:
            shared |= shared_memory_of(session)
            time.sleep(_POLL_SECONDS)
    for path in sorted(shared):
        if os.path.exists(path) and os.stat(path).st_uid == os.getuid():
            os.unlink(path)


def end_own_session() -> None:
    """Kill every process of the caller's session, the caller last. Only for a process that leads its session."""
    session = os.getsid(0)
    if session != os.getpid():
        raise RuntimeError(
            f"process {os.getpid()} does not lead its session {session}: start it with start_new_session=True"
        )
    shared = shared_memory_of(session)
    for process in members_of(session):
        if process != session:
            os.kill(process, signal.SIGKILL)
    for path in shared:
        Path(path).unlink(missing_ok=True)
    os.kill(session, signal.SIGKILL)


def _signal_all(session: int, number: signal.Signals) -> None:
    for process in members_of(session):
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def _processes() -> Iterator[tuple[int, str, int]]:
    """(process id, state, session) of everything that runs."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        # The command's name may hold blanks and parentheses; fields are counted after its last parenthesis (proc(5)).
        fields = stat.rpartition(")")[2].split()
        yield int(entry), fields[0], int(fields[3])


def _shared_of(process: int) -> set[str]:
    paths: set[str] = set()
    try:
        for line in Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines():
            at = line.find(_SHARED)
            if at >= 0:
                paths.add(line[at:].removesuffix(" (deleted)"))
        for descriptor in os.listdir(f"/proc/{process}/fd"):
            target = os.readlink(f"/proc/{process}/fd/{descriptor}")
            if target.startswith(_SHARED):
                paths.add(target.removesuffix(" (deleted)"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return paths
    return paths
