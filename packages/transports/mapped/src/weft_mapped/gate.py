"""A gate per peer: what it may write, taken back before memory goes.

One-sided writes need nobody's help, so nothing would keep a sender from writing memory that its receiver has given
back, or that was granted to an earlier life of the sender. A gate is a small file in memory that both map. The sender
holds a shared lock on it during each copy and looks first whether it may; the receiver says in it what has ended, then
takes the lock alone once. The kernel unlocks for who dies.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np

from weft.deadline import Deadline
from weft.errors import DeadlineError, PeerLostError, TransportError
from weft_mapped.kernel import IOVEC, Life, write_error, write_memory

MOST_REGIONS = (1 << 20) - 32
"""Registrations in the life of an endpoint: a byte each."""
_GATE_BYTES = 1 << 20
_SHUT, _PROBE, _PROBE_BYTES, _REGIONS = 0, 8, 16, 32
_SETTLE_SECONDS = 5.0
"""Copies take milliseconds; only a sender that is stopped in the middle of one takes longer."""


class Invitation(msgspec.Struct, frozen=True, array_like=True):
    """What a sender needs to find the gate."""

    descriptor: int
    """Of the file, in the receiver's process."""
    name: str
    """Of the file; nothing else has it."""
    address: int
    """Where the receiver maps it."""


class Gate:
    """The receiver's side."""

    def __init__(self, peer: str, name: str) -> None:
        self._peer, self._name = peer, name
        self._file = os.memfd_create(name)
        os.ftruncate(self._file, _GATE_BYTES)
        self._said = np.frombuffer(mmap.mmap(self._file, _GATE_BYTES), np.uint8)

    @property
    def invitation(self) -> Invitation:
        """For the peer."""
        return Invitation(self._file, self._name, self._said.ctypes.data)

    def withdraw(self, serial: int) -> None:
        """Nothing writes this region once it returns. Raises `TransportError` when a copy does not end."""
        self._said[_REGIONS + serial] = 1
        self._settle()

    def shut(self) -> None:
        """No copy begins any more."""
        self._said[_SHUT] = 1

    def remove(self) -> None:
        """Nothing writes anything here by this gate once it returns. Raises as `withdraw`; the gate is gone anyway."""
        self.shut()
        try:
            self._settle()
        finally:
            os.close(self._file)

    def _settle(self) -> None:
        deadline = Deadline.after(_SETTLE_SECONDS)
        try:
            deadline.wait(self._alone, "a copy", lambda: [self._peer])
        except DeadlineError as error:
            raise TransportError(
                f"{self._peer} has been stopped in the middle of a copy into memory of this process: end it before "
                "that memory is used for anything else"
            ) from error
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def _alone(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class Pass:
    """The sender's side."""

    def __init__(self, life: Life, invitation: Invitation) -> None:
        """Raises `PeerLostError` when the process or the gate is not there, `TransportError` when it may not look."""
        self._life, self._invitation = life, invitation
        path = f"/proc/{life.pid}/fd/{invitation.descriptor}"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise write_error(error, life.peer, f"opening {path}") from error
        weakref.finalize(self, os.close, self._file)  # when no copy uses it any more
        found = os.readlink(f"/proc/self/fd/{self._file}")
        if found != f"/memfd:{invitation.name} (deleted)":
            raise PeerLostError(life.peer, f"{path} is {found}: its endpoint has closed")
        self._said = np.frombuffer(mmap.mmap(self._file, _GATE_BYTES), np.uint8)

    @contextmanager
    def entered(self, serials: Sequence[int]) -> Iterator[bool]:
        """Hold these regions of the peer for a copy; whether that was possible at once.

        Raises `PeerLostError` when its process has ended or has disconnected, `TransportError` when it has
        deregistered one of the regions.
        """
        again = os.open(f"/proc/self/fd/{self._file}", os.O_RDWR | os.O_CLOEXEC)  # a lock of this copy's own
        try:
            try:
                fcntl.flock(again, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # the receiver is taking something back
                yield False
                return
            self._life.check()
            if self._said[_SHUT]:
                raise PeerLostError(self._life.peer, "it has disconnected from this endpoint")
            if any(self._said[_REGIONS + serial] for serial in serials):
                raise TransportError(f"memory is not registered by {self._life.peer} any more")
            yield True
        finally:
            os.close(again)

    def probe(self) -> None:
        """Write into the gate by `process_vm_writev` and see it arrive. Raises `TransportError` that has the fix."""
        word = np.frombuffer(os.urandom(_PROBE_BYTES), np.uint8)
        what = f"writing memory of process {self._life.pid} by process_vm_writev"
        there = np.array([(self._invitation.address + _PROBE, _PROBE_BYTES)], IOVEC)
        try:
            write_memory(self._life.pid, np.array([(word.ctypes.data, _PROBE_BYTES)], IOVEC), there)
        except OSError as error:
            raise write_error(error, self._life.peer, what) from error
        if not np.array_equal(self._said[_PROBE : _PROBE + _PROBE_BYTES], word):
            raise TransportError(f"{what} (peer {self._life.peer}): nothing arrives; use transport nixl or gloo")
