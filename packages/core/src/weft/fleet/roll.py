"""The roll of a fleet: which replicas take part, as the source of rank 0 decides and all sources learn.

Keys, below `weft/<job>/fleet/`:

- `announcing`, `announcements`: counters of announcements begun and made; `announced/<replica>/<member>`: who waits to
  be admitted, a lease of its own;
- `hello/<rank>`: a source of this life of the trainer; `opening`: the first roll, for exactly those sources;
  `heard/<rank>`: that a source has read it;
- `rolls`: counter; `roll/<n>`: who takes part from then on.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from urllib.parse import quote

import msgspec

from weft.deadline import Deadline
from weft.errors import StoreError
from weft.job_store import JobStore

_LOG = logging.getLogger(__name__)
_NONCE_BYTES = 16
_LEASE_SECONDS = 20.0
"""After so long without a sign of life a member does not wait any more."""


class Announced(msgspec.Struct, frozen=True, array_like=True):
    """A member of a replica that waits to be admitted. New fields go to the end, with defaults."""

    replica: str
    member: str
    size: int
    """Members of that replica."""
    number: int
    """Grows with every announcement of the fleet."""


class Roll(msgspec.Struct, frozen=True, array_like=True):
    """Who takes part. New fields go to the end, with defaults."""

    number: int
    replicas: dict[str, int]
    """By name: the largest number of its members' announcements."""
    sources: tuple[bytes, ...] = ()
    """Of the first roll of a trainer's life: what every source said in its hello, by rank."""


class RollBook:
    """A job's roll in the store."""

    def __init__(self, records: JobStore, rank: int, sources: int) -> None:
        self._records, self._rank, self._sources = records, rank, sources
        self._root = f"{records.root}/fleet"
        self._nonce = os.urandom(_NONCE_BYTES)
        self._seen = -1
        self._waiting: dict[str, int] = {}
        self._admitted: dict[str, int] = {}

    def waiting(self) -> dict[str, int]:
        """Replicas all of whose members wait to be admitted since the last time, with the largest number of their
        announcements. One operation when nobody has come since the last call.
        """
        count = self._records.store.add(f"{self._root}/announcements", 0)
        if count != self._seen:
            members: defaultdict[str, list[Announced]] = defaultdict(list)
            for key in self._records.store.keys(f"{self._root}/announced/"):
                found = self._records.find("announced", key, Announced)
                if found is not None and found.number > self._admitted.get(found.replica, 0):
                    members[found.replica].append(found)
            self._waiting = {
                replica: max(member.number for member in found)
                for replica, found in members.items()
                if len(found) == found[0].size
            }
            self._seen = count
        return self._waiting

    def write(self, replicas: dict[str, int], sources: tuple[bytes, ...] = ()) -> Roll:
        """The next roll. By rank 0 alone."""
        roll = Roll(self._records.store.add(f"{self._root}/rolls", 1), replicas, sources)
        self._admitted.update(replicas)
        self._waiting = {name: number for name, number in self._waiting.items() if replicas.get(name) != number}
        self._records.put("roll", f"{self._root}/roll/{roll.number}", roll)
        self._records.store.delete(f"{self._root}/roll/{roll.number - 8}")
        return roll

    def wait(self, number: int, deadline: Deadline) -> Roll:
        """A roll that rank 0 writes now or has written. Raises `DeadlineError`."""
        found: list[Roll] = []

        def ready() -> bool:
            roll = self._records.find("roll", f"{self._root}/roll/{number}", Roll)
            found.extend([] if roll is None else [roll])
            return bool(found)

        deadline.wait(ready, f"roll {number} of the fleet", lambda: ["the source of rank 0"])
        return found[0]

    def open(self, replicas: int, deadline: Deadline) -> Roll:
        """Agree on the first roll with all sources of this life of the trainer, once so many replicas are whole.

        Raises `DeadlineError` that names the sources that did not come, or says which replicas did.
        """
        self._records.put("hello", f"{self._root}/hello/{self._rank}", self._nonce)
        return self._lead(replicas, deadline) if self._rank == 0 else self._follow(deadline)

    def _follow(self, deadline: Deadline) -> Roll:
        found: list[Roll] = []

        def ready() -> bool:
            roll = self._records.find("roll", f"{self._root}/opening", Roll)
            if roll is not None and self._rank < len(roll.sources) and roll.sources[self._rank] == self._nonce:
                found.append(roll)
            return bool(found)

        deadline.wait(ready, "the opening of the fleet", lambda: ["the source of rank 0"])
        self._records.put("heard", f"{self._root}/heard/{self._rank}", found[0].number)
        return found[0]

    def _lead(self, replicas: int, deadline: Deadline) -> Roll:
        deadline.wait(lambda: len(self.waiting()) >= replicas, f"{replicas} replicas of the fleet", self._absent)
        roll: Roll | None = None

        def agreed() -> bool:
            nonlocal roll
            hellos = tuple(self._records.find("hello", self._hello(rank), bytes) or b"" for rank in self._ranks())
            whole = {**(roll.replicas if roll else {}), **self.waiting()}
            if not all(hellos) or len(whole) < replicas:  # who was whole may have gone again
                return False
            if roll is None or roll.sources != hellos:
                roll = self.write(whole, hellos)
                self._records.put("roll", f"{self._root}/opening", roll)
            return not self._late(roll)

        deadline.wait(agreed, "all sources of the fleet", lambda: self._late(roll))
        assert roll is not None, "agreed"
        return roll

    def _late(self, roll: Roll | None) -> list[str]:
        number = None if roll is None else roll.number
        return [
            f"the source of rank {rank}"
            for rank in self._ranks()
            if rank and self._records.find("heard", f"{self._root}/heard/{rank}", int) != number
        ]

    def _absent(self) -> list[str]:
        return [f"there are {', '.join(sorted(self._waiting)) or 'none'}"]

    def _ranks(self) -> range:
        return range(self._sources)

    def _hello(self, rank: int) -> str:
        return f"{self._root}/hello/{rank}"


class Announcement:
    """That a member of a replica waits to be admitted: a lease, renewed in a thread of its own until it ends."""

    def __init__(self, records: JobStore, replica: str, member: str, size: int) -> None:
        root = f"{records.root}/fleet"
        number = records.store.add(f"{root}/announcing", 1)
        key = f"{root}/announced/{quote(replica, safe='')}/{quote(member, safe='')}"
        made = Announced(replica, member, size, number)
        self._lease = records.lease("announced", key, made, _LEASE_SECONDS)
        records.store.add(f"{root}/announcements", 1)  # last: whoever sees it finds the record
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"announcement of {member}", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(_LEASE_SECONDS / 4):
            try:
                self._lease.renew()
            except StoreError as error:
                _LOG.warning("nobody knows any more that this member waits to be admitted: %s", error)
                return

    def end(self) -> None:
        """The member waits no longer. Idempotent."""
        self._ended.set()
        self._thread.join()
        self._lease.release()
