"""The `file://` store: a directory. A value is a file that is replaced whole, a counter one changed under a lock.

A value's file starts with a mark. After the mark of a lease come who holds it and for how long; the file's time of
change says when it was renewed last. All times are the file server's, which no member's own clock comes into.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

from weft.contracts import StoreLease
from weft.deadline import Deadline
from weft.errors import DeadlineError, StoreError
from weft.store_lease import KeyLease, check_lease
from weft.store_retry import insist

_NAME_CHARACTERS = 200
"""File systems end names at 255 bytes; longer keys become nested directories."""
_VALUE, _COUNTER, _MORE, _TEMPORARY = ".value", ".counter", ".more", ".temporary"
_IDENTITY, _CLOCK = "identity.store", "clock.store"
_PLAIN, _LEASED = b"w", b"l"
_HOLD = struct.Struct(">16sd")
"""Who holds a lease, and for how many seconds."""
_AWAY = {errno.ENOENT, errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENODEV}
"""What a file system says that may come back."""
_LONGEST_LOOK_SECONDS = 0.25
_ADVICE = "is the directory there, and its file system mounted?"

T = TypeVar("T")


class FileStore:
    """A directory as a store, for members on one machine or on a shared file system with working `flock`.

    Safe to use from several threads and processes. An operation waits at most `operation_seconds` for the lock of a
    counter, and for a directory that is away; a mount that blocks for ever (NFS, `hard`) blocks with it. `watch` looks
    again and again, up to four times a second, since file servers tell nobody what changes. A holder that is frozen
    in the middle of a renewal may bring back a lease that others have seen expire.
    """

    def __init__(self, directory: str, deadline: Deadline, *, operation_seconds: float = 30.0) -> None:
        self.url = f"file://{directory}"
        self._root = Path(directory)
        self._operation_seconds = min(operation_seconds, deadline.seconds)
        self._closed = False
        self._identity = self._insist("open", self._founded)

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`."""
        self._run(f"set {key!r}", lambda: self._write(key, _PLAIN + value))

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        return self._run(f"get {key!r}", lambda: self._read(self._path(key, _VALUE)))

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        return self._run(f"add to {key!r}", lambda: self._add(self._path(key, _COUNTER), amount))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""

        def delete() -> None:
            self._path(key, _VALUE).unlink(missing_ok=True)
            self._path(key, _COUNTER).unlink(missing_ok=True)

        self._run(f"delete {key!r}", delete)

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`. Looks into every file whose key starts so: not for hot paths."""
        return self._run(f"list {prefix!r}", lambda: self._listed(prefix))

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        """See `Store.lease`. The file server's clock counts."""
        check_lease(self.url, key, value, seconds)
        token = uuid.uuid4().bytes
        self._run(f"lease {key!r}", lambda: self._write(key, _LEASED + _HOLD.pack(token, seconds) + value))
        path = self._path(key, _VALUE)
        return KeyLease(
            self.url,
            key,
            seconds,
            lambda: self._run(f"renew {key!r}", lambda: self._touch(path, token, None)),
            # Expired long ago: what has replaced the file meanwhile is another file, and not touched.
            lambda: self._run(f"release {key!r}", lambda: self._touch(path, token, (0, 0))),
        )

    def watch(self, key: str, known: bytes | None, deadline: Deadline) -> bytes | None:
        """See `Store.watch`, and the class."""
        sleep_seconds = 0.001
        while (value := self.get(key)) == known and not deadline.expired():
            time.sleep(min(sleep_seconds, deadline.remaining()))
            sleep_seconds = min(2 * sleep_seconds, _LONGEST_LOOK_SECONDS)
        return value

    def close(self) -> None:
        """See `Store.close`."""
        self._closed = True

    def __repr__(self) -> str:
        return f"FileStore({self.url!r})"

    def _founded(self) -> bytes:
        """What tells this directory from an empty one in its place; made by the first who opens it."""
        self._root.mkdir(parents=True, exist_ok=True)
        path, temporary = self._root / _IDENTITY, self._temporary()
        try:
            temporary.write_bytes(uuid.uuid4().bytes)
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
        return path.read_bytes()

    def _run(self, what: str, operate: Callable[[], T]) -> T:
        def operate_here() -> T:
            if (self._root / _IDENTITY).read_bytes() != self._identity:
                raise StoreError(
                    f"store {self.url}: it has lost what it held: another directory is in its place; "
                    "start all members anew, with a new job name"
                )
            return operate()

        return self._insist(what, operate_here)

    def _insist(self, what: str, operate: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return operate()
            except (OSError, DeadlineError) as error:
                if isinstance(error, OSError) and error.errno in _AWAY:
                    raise _AwayError(error) from error
                raise StoreError(f"store {self.url}: {what}: {error}") from error

        def refuse() -> None:
            if self._closed:
                raise StoreError(f"store {self.url}: {what}: it is closed")

        deadline = Deadline.after(self._operation_seconds)
        return insist(self.url, what, attempt, deadline, (_AwayError,), refuse, _ADVICE)

    def _write(self, key: str, data: bytes) -> None:
        path, temporary = self._path(key, _VALUE), self._temporary()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, path: Path) -> bytes | None:
        """The value in a file, unless there is none, or its lease has expired."""
        try:
            with path.open("rb") as file:
                mark = file.read(1)
                if mark == _PLAIN:
                    return file.read()
                _, seconds = _HOLD.unpack(file.read(_HOLD.size))
                return None if self._expired(file.fileno(), seconds) else file.read()
        except FileNotFoundError:
            return None

    def _touch(self, path: Path, token: bytes, times: tuple[int, int] | None) -> bool:
        """Set a lease's time, to that of the file server for None; says whether it was still this holder's."""
        try:
            with path.open("rb") as file:
                if file.read(1) != _LEASED:
                    return False
                holder, seconds = _HOLD.unpack(file.read(_HOLD.size))
                if holder != token or self._expired(file.fileno(), seconds):
                    return False
                os.utime(file.fileno(), times)
                return True
        except FileNotFoundError:
            return False

    def _expired(self, descriptor: int, seconds: float) -> bool:
        renewed = os.fstat(descriptor).st_mtime
        clock = os.open(self._root / _CLOCK, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.utime(clock)
            return os.fstat(clock).st_mtime - renewed >= seconds
        finally:
            os.close(clock)

    def _add(self, path: Path, amount: int) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(descriptor, path)
                if os.fstat(descriptor).st_nlink == 0:
                    continue  # deleted between open and lock: what we hold is nobody's counter any more
                total = int(os.pread(descriptor, 32, 0) or b"0") + amount
                _write_once(descriptor, b"%20d" % total)
                return total
            finally:
                os.close(descriptor)

    def _listed(self, prefix: str) -> list[str]:
        found: dict[str, None] = {}
        for folder, _, names in os.walk(self._root):
            parents = [part.removesuffix(_MORE) for part in Path(folder).relative_to(self._root).parts]
            for name in names:
                stem, dot, suffix = name.rpartition(".")
                key = unquote("".join([*parents, stem]))
                if not key.startswith(prefix) or dot + suffix not in (_VALUE, _COUNTER):
                    continue
                if dot + suffix == _COUNTER or self._read(Path(folder, name)) is not None:
                    found[key] = None
        return sorted(found)

    def _temporary(self) -> Path:
        return self._root / f"{uuid.uuid4().hex}{_TEMPORARY}"

    def _lock(self, descriptor: int, path: Path) -> None:
        deadline = Deadline.after(self._operation_seconds)
        deadline.wait(lambda: _locked(descriptor), f"lock of {path}", lambda: ["whoever holds it"])

    def _path(self, key: str, suffix: str) -> Path:
        quoted = quote(key, safe="")
        names = [quoted[start : start + _NAME_CHARACTERS] for start in range(0, len(quoted), _NAME_CHARACTERS)] or [""]
        return self._root.joinpath(*(name + _MORE for name in names[:-1]), names[-1] + suffix)


class _AwayError(Exception):
    """The directory may come back."""


def _write_once(descriptor: int, data: bytes) -> None:
    try:
        os.pwrite(descriptor, data, 0)
    except OSError as error:  # whether it was written is unknown, and it must not be written twice
        raise DeadlineError(f"writing a counter ({error})", 0, ["the file system"]) from error


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
