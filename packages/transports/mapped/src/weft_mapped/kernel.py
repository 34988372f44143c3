"""The calls of Linux that reach into other processes, through ctypes since Python has none of them.

ctypes lets go of Python's lock while a call runs. Numbers are those of `linux/prctl.h` and `limits.h`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import select
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weft.errors import PeerLostError, TransportError

IOVEC = np.dtype([("address", "<u8"), ("nbytes", "<u8")])
"""`struct iovec`."""
MOST_IOVECS = 1024
"""IOV_MAX: what one call takes."""
PTRACE_SCOPE = "proc/sys/kernel/yama/ptrace_scope"
"""Yama's restriction, under the root; absent where the kernel has no Yama."""
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_FIXES = {
    errno.EACCES: "run both as one user",
    errno.EPERM: "run both as one user, let the receiver keep its option allow_writers, and where Yama's ptrace_scope "
    "is 2 or 3 give the sender CAP_SYS_PTRACE",
    errno.ENOSYS: "let the container's seccomp profile pass process_vm_writev (docker run --cap-add=SYS_PTRACE)",
}


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.process_vm_writev.restype = ctypes.c_ssize_t
    return library


def write_memory(pid: int, local: npt.NDArray[np.void], remote: npt.NDArray[np.void]) -> int:
    """`process_vm_writev(2)`: bytes of this process into another, in one copy. Returns how many; raises `OSError`.

    Both are of dtype `IOVEC`, at most `MOST_IOVECS` long. It ends early at the first remote page that is not there.
    """
    written: int = _libc().process_vm_writev(
        ctypes.c_int(pid), ctypes.c_void_p(local.ctypes.data), ctypes.c_ulong(len(local)),
        ctypes.c_void_p(remote.ctypes.data), ctypes.c_ulong(len(remote)), ctypes.c_ulong(0),
    )  # fmt: skip
    if written < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return written


def copy_memory(local: npt.NDArray[np.void], mapped: npt.NDArray[np.void]) -> None:
    """Copies between addresses of this process, pair by pair; `mapped` is written."""
    for (source, nbytes), (target, _) in zip(local.tolist(), mapped.tolist(), strict=True):
        ctypes.memmove(target, source, nbytes)


def allow_writers() -> None:
    """Where Yama asks for it: let every process of this user write this one's memory (`PR_SET_PTRACER`)."""
    scope = Path("/", PTRACE_SCOPE)
    if scope.exists() and scope.read_text().strip() == "1":
        # Where it is refused the sender's probe says so.
        _libc().prctl(ctypes.c_int(_PR_SET_PTRACER), _PR_SET_PTRACER_ANY, 0, 0, 0)


def write_error(error: OSError, peer: str, what: str) -> TransportError:
    """What it means that `what` failed, and what to do."""
    if error.errno in (errno.ESRCH, errno.ENOENT):
        return PeerLostError(peer, f"{what}: its process has ended")
    fix = _FIXES.get(error.errno or 0)
    if fix is None:
        return TransportError(f"{what} (peer {peer}) failed: {error.strerror}")
    return TransportError(f"{what} (peer {peer}) is forbidden ({error.strerror}): {fix}; or use transport nixl or gloo")


class Life:
    """One life of a process, which another one of the same number cannot be taken for."""

    def __init__(self, peer: str, pid: int, started: int) -> None:
        """`started` is what `start_time` gave in that process. Raises `PeerLostError` when it is not there any more."""
        self.peer, self.pid = peer, pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise write_error(error, peer, f"looking for process {pid}") from error
        weakref.finalize(self, os.close, self._pidfd)  # when no copy uses it any more
        if start_time(pid) != started:
            raise PeerLostError(peer, f"process {pid} is another one now")

    def check(self) -> None:
        """Raise `PeerLostError` once it is over."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            raise PeerLostError(self.peer, f"its process {self.pid} has ended")


def start_time(pid: int) -> int | None:
    """When a process started, in ticks since the machine did (`/proc/PID/stat`); None when there is none."""
    try:
        return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None
