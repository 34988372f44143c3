"""What a job keeps in the store: its records, each with the code of the job's secret, if the job has one.

All records are written and read here. A record's code covers its key in the store, so a record that somebody moves to
another key, or takes from another job, is refused. Content (`weft.content`) needs no code: its address, which stands
in a record, says which bytes it must be. Counters have none, since the store itself counts: whoever can write to the
store can keep members from meeting, but not make them believe anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

from weft.authentication import Secret
from weft.contracts import Store, StoreLease
from weft.deadline import Deadline
from weft.errors import RecordError
from weft.records import open_record, seal

T = TypeVar("T")


class JobStore:
    """The records of one job."""

    def __init__(self, store: Store, job: str, secret: Secret | None = None) -> None:
        self.store = store
        self.root = f"weft/{quote(job, safe='')}"
        """What all keys of the job begin with."""
        self.key = secret.key(job) if secret else None
        """Of the job; None without a secret."""
        self._job = job
        self._record_key = self.key.derived(b"record") if self.key else None

    def put(self, kind: str, key: str, obj: object) -> None:
        """Write a record. Raises `RecordError` when it is larger than its kind allows."""
        self.store.set(key, seal(kind, obj, place=key, key=self._record_key))

    def lease(self, kind: str, key: str, obj: object, seconds: float) -> StoreLease:
        """Write a record that vanishes when it has not been renewed for `seconds`."""
        return self.store.lease(key, seal(kind, obj, place=key, key=self._record_key), seconds)

    def check(self, kind: str, obj: object) -> None:
        """Raise the `RecordError` that `put` would raise."""
        seal(kind, obj, key=self._record_key)

    def find(self, kind: str, key: str, type: type[T]) -> T | None:
        """The record at a key, None when there is none. Raises `RecordError` for anything but a record of this kind,
        schema, key, job and secret.
        """
        data = self.store.get(key)
        return None if data is None else self.opened(kind, key, type, data)

    def await_record(
        self, kind: str, key: str, type: type[T], wanted: Callable[[T], bool], deadline: Deadline
    ) -> T | None:
        """The record at a key as soon as there is one that is wanted; None when there is none by the deadline. Watches,
        so that nobody asks again and again; raises as `find` does.
        """
        known: bytes | None = None
        while True:
            known = self.store.watch(key, known, deadline)
            if known is not None and wanted(found := self.opened(kind, key, type, known)):
                return found
            if deadline.expired():
                return None

    def opened(self, kind: str, key: str, type: type[T], data: bytes) -> T:
        """The record in bytes that the store gave for a key; raises as `find` does."""
        try:
            return open_record(kind, type, data, place=key, key=self._record_key)
        except RecordError as error:
            raise RecordError(f"{key} of job {self._job!r}: {error}") from error
