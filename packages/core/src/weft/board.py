"""What leaders write in the store for people to look at. No version waits for it."""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from weft.errors import WeftError
from weft.job_store import JobStore

_LOG = logging.getLogger(__name__)
_KEPT_VERSIONS = 8
"""Records of so many versions stay."""
_WAITING = 64
"""Records that may wait for a store that does not answer; those of later versions are not written."""
_END_SECONDS = 2.0
"""`close` waits so long for the last ones."""


class Board:
    """Writes records in a thread of its own, which starts with the first one. For one member; `show` never waits."""

    def __init__(self, records: JobStore, prefix: str) -> None:
        """Keys begin with `prefix`."""
        self._records, self._prefix = records, prefix
        self._waiting: SimpleQueue[tuple[str, int, str, object] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.operations = 0
        """On the store, by what was shown so far."""

    def show(self, kind: str, version: int, rest: str, record: object) -> None:
        """Write a record at `<prefix>/<kind>/<version><rest>`, and take away the one of an old version there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="weft board", daemon=True)
            self._thread.start()
        if self._waiting.qsize() < _WAITING:
            self._waiting.put((kind, version, rest, record))
            self.operations += 2
        else:
            _LOG.warning("the %s of version %d is not in the store, which does not answer", kind, version)

    def close(self) -> None:
        """Write what is left, unless the store takes too long. Idempotent."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(_END_SECONDS)
            self._thread = None

    def _write(self) -> None:
        while (entry := self._waiting.get()) is not None:
            kind, version, rest, record = entry
            folder = f"{self._prefix}/{kind}"
            try:
                self._records.put(kind, f"{folder}/{version}{rest}", record)
                self._records.store.delete(f"{folder}/{version - _KEPT_VERSIONS}{rest}")
            except WeftError as error:
                _LOG.warning("the %s of version %d is not in the store for people to look at: %s", kind, version, error)
