"""Broken stores: `file`, each with one method that does it wrong. URLs are `loses-writes:///directory` and so on.

Their schemes are entry points of no distribution; whoever tests with them installs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from weft.contracts import Store, StoreLease
from weft.deadline import Deadline
from weft.store_file import FileStore
from weft.store_lease import KeyLease
from weft.testing.broken import Fault


class LosesWrites(FileStore):
    """Keeps the first value of a key."""

    def set(self, key: str, value: bytes) -> None:
        if super().get(key) is None:
            super().set(key, value)


class AddsInSteps(FileStore):
    """Reads a counter, and writes it later."""

    def add(self, key: str, amount: int) -> int:
        total = super().add(key, 0) + amount
        time.sleep(0)
        super().add(key, total - super().add(key, 0))
        return total


class ReadsOldValues(FileStore):
    """Remembers what it has read."""

    def __init__(self, directory: str, deadline: Deadline) -> None:
        super().__init__(directory, deadline)
        self._known: dict[str, bytes | None] = {}

    def get(self, key: str) -> bytes | None:
        if self._known.get(key) is None:
            self._known[key] = super().get(key)
        return self._known[key]

    def set(self, key: str, value: bytes) -> None:
        super().set(key, value)
        self._known[key] = value


class ListsFolders(FileStore):
    """Takes a prefix for the name of a folder."""

    def keys(self, prefix: str) -> list[str]:
        folder = f"{prefix.rstrip('/')}/"
        return [key for key in super().keys("") if not prefix or key.startswith(folder)]


class WaitsForKeys(FileStore):
    """Waits for as long as it takes until a key is there."""

    def get(self, key: str) -> bytes | None:
        while (value := super().get(key)) is None:
            time.sleep(0.01)
        return value


class WritesInPlace(FileStore):
    """Overwrites large values half by half."""

    def set(self, key: str, value: bytes) -> None:
        half = len(value) // 2
        old = super().get(key)
        if old is not None and half > 1 << 20:
            super().set(key, value[:half] + old[half:])
            time.sleep(0.05)
        super().set(key, value)


class CutsValues(FileStore):
    """Keeps 8 MiB of a value, and says nothing."""

    def set(self, key: str, value: bytes) -> None:
        super().set(key, value[: 8 << 20])


class StaysOpen(FileStore):
    """Does not close."""

    def close(self) -> None:
        pass


class KeepsLeases(FileStore):
    """Leases never end."""

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        return super().lease(key, value, 1e6)


class ForgetsRenewals(FileStore):
    """Leases end, renewed or not."""

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        lease = super().lease(key, value, seconds)
        return KeyLease(self.url, key, seconds, lambda: True, lease.release)


class ReleasesOthers(FileStore):
    """Takes the lease of whoever holds the key."""

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        lease = super().lease(key, value, seconds)

        def renew() -> bool:
            lease.renew()
            return True

        return KeyLease(self.url, key, seconds, renew, lambda: self.delete(key))


class WatchesToTheEnd(FileStore):
    """Looks when the deadline is over."""

    def watch(self, key: str, known: bytes | None, deadline: Deadline) -> bytes | None:
        time.sleep(deadline.remaining())
        return self.get(key)


class WatchesValuesOnly(FileStore):
    """Waits until there is a value."""

    def watch(self, key: str, known: bytes | None, deadline: Deadline) -> bytes | None:
        while (value := super().watch(key, known, deadline)) is None and not deadline.expired():
            time.sleep(0.01)
        return known if value is None else value


KINDS: Mapping[str, Callable[[str, Deadline], Store]] = {
    "loses-writes": LosesWrites,
    "adds-in-steps": AddsInSteps,
    "reads-old-values": ReadsOldValues,
    "lists-folders": ListsFolders,
    "waits-for-keys": WaitsForKeys,
    "writes-in-place": WritesInPlace,
    "cuts-values": CutsValues,
    "stays-open": StaysOpen,
    "keeps-leases": KeepsLeases,
    "forgets-renewals": ForgetsRenewals,
    "releases-others": ReleasesOthers,
    "watches-to-the-end": WatchesToTheEnd,
    "watches-values-only": WatchesValuesOnly,
}
"""By URL scheme."""


def open_broken(url: str, deadline: Deadline) -> Store:
    """What the scheme's entry point is: `weft.testing.broken.stores:open_broken`."""
    parts = urlsplit(url)
    return KINDS[parts.scheme](parts.path, deadline)


FAULTS = (
    Fault("loses-writes", "test_a_write_replaces_what_was_there", "a write was lost"),
    Fault("adds-in-steps", "test_processes_adding_at_once_get_different_sums", "adding is not atomic"),
    Fault("reads-old-values", "test_a_client_reads_what_another_has_written_since", "an old value was read again"),
    Fault("lists-folders", "test_keys_are_listed_by_prefix_and_sorted", "keys('job') lists"),
    Fault("waits-for-keys", "test_a_missing_key_reads_as_none_without_waiting", "waits without a deadline", seconds=1),
    Fault("writes-in-place", "test_readers_see_whole_values_while_they_are_replaced", "half replaced"),
    Fault("cuts-values", "test_values_of_any_size_come_back_unchanged", "bytes came back changed"),
    Fault("stays-open", "test_a_closed_client_refuses_and_closes_twice", "DID NOT RAISE"),
    Fault("keeps-leases", "test_a_lease_that_is_not_renewed_vanishes", "is still there", seconds=2),
    Fault("forgets-renewals", "test_a_lease_that_is_renewed_stays", "vanished although it was renewed"),
    Fault("releases-others", "test_a_lease_that_was_replaced_takes_nothing_with_it", "another's key was removed"),
    Fault("watches-to-the-end", "test_a_watch_ends_when_the_value_changes", "has not ended within", seconds=2),
    Fault("watches-values-only", "test_a_watch_sees_a_key_vanish", "was not seen to vanish", seconds=2),
)
