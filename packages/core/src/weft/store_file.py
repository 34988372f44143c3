"""The `file://` store: a directory. A value is a file that is replaced whole, a counter one changed under a lock."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from weft.deadline import Deadline
from weft.errors import DeadlineError, StoreError

_NAME_CHARACTERS = 200
"""File systems end names at 255 bytes; longer keys become nested directories."""
_VALUE, _COUNTER, _MORE, _TEMPORARY = ".value", ".counter", ".more", ".temporary"


class FileStore:
    """A directory as a store, for members on one machine or on a shared file system with working `flock`.

    Safe to use from several threads and processes. `add` waits at most `operation_seconds` for the lock of a counter.
    """

    def __init__(self, directory: str, deadline: Deadline, *, operation_seconds: float = 30.0) -> None:
        self.url = f"file://{directory}"
        self._root = Path(directory)
        self._operation_seconds = min(operation_seconds, deadline.seconds)
        self._closed = False
        with self._mapped("open"):
            self._root.mkdir(parents=True, exist_ok=True)
            probe = self._temporary()
            probe.touch()
            probe.unlink()

    def set(self, key: str, value: bytes) -> None:
        """See `Store.set`. Readers see the old value or the new one, never a part."""
        path = self._path(key, _VALUE)
        temporary = self._temporary()
        with self._mapped(f"set {key!r}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(value)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def get(self, key: str) -> bytes | None:
        """See `Store.get`."""
        with self._mapped(f"get {key!r}"):
            try:
                return self._path(key, _VALUE).read_bytes()
            except FileNotFoundError:
                return None

    def add(self, key: str, amount: int) -> int:
        """See `Store.add`."""
        path = self._path(key, _COUNTER)
        with self._mapped(f"add to {key!r}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    self._lock(descriptor, path)
                    if os.fstat(descriptor).st_nlink == 0:
                        continue  # deleted between open and lock: what we hold is nobody's counter any more
                    total = int(os.pread(descriptor, 32, 0) or b"0") + amount
                    os.pwrite(descriptor, b"%20d" % total, 0)
                    return total
                finally:
                    os.close(descriptor)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._mapped(f"delete {key!r}"):
            self._path(key, _VALUE).unlink(missing_ok=True)
            self._path(key, _COUNTER).unlink(missing_ok=True)

    def keys(self, prefix: str) -> list[str]:
        """See `Store.keys`."""
        found: set[str] = set()
        with self._mapped(f"list {prefix!r}"):
            for folder, _, names in os.walk(self._root):
                parents = [part.removesuffix(_MORE) for part in Path(folder).relative_to(self._root).parts]
                for name in names:
                    stem, dot, suffix = name.rpartition(".")
                    if dot + suffix in (_VALUE, _COUNTER):
                        found.add(unquote("".join([*parents, stem])))
        return sorted(key for key in found if key.startswith(prefix))

    def close(self) -> None:
        """See `Store.close`."""
        self._closed = True

    def __repr__(self) -> str:
        return f"FileStore({self.url!r})"

    def _temporary(self) -> Path:
        return self._root / f"{uuid.uuid4().hex}{_TEMPORARY}"

    def _lock(self, descriptor: int, path: Path) -> None:
        deadline = Deadline.after(self._operation_seconds)
        deadline.wait(lambda: _locked(descriptor), f"lock of {path}", lambda: ["whoever holds it"])

    def _path(self, key: str, suffix: str) -> Path:
        quoted = quote(key, safe="")
        names = [quoted[start : start + _NAME_CHARACTERS] for start in range(0, len(quoted), _NAME_CHARACTERS)] or [""]
        return self._root.joinpath(*(name + _MORE for name in names[:-1]), names[-1] + suffix)

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        if self._closed:
            raise StoreError(f"store {self.url}: {what}: it is closed")
        try:
            yield
        except (OSError, DeadlineError) as error:
            raise StoreError(f"store {self.url}: {what}: {error}") from error


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
