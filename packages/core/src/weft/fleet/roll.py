"""The roll of a fleet: which replicas take part, as the source of rank 0 decides and all sources learn.

Keys, below `weft/<job>/fleet/`:

- `announcing`, `announcements`: counters of announcements begun and made; `announced/<replica>/<member>`: who waits to
  be admitted, a lease of its own;
- `hello/<rank>`: a source of this life of the trainer; `opening`: the first roll, for exactly those sources;
  `heard/<rank>`: that a source has read it; `opened`: that all have;
- `rolls`: counter; `roll/<n>`: who takes part from then on; `at/<version>`: the roll of a version, where
  no cell is left over which it could be told;
- `bell`: changes when a member has come, for those who do not look by themselves (`weft.publication`).
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

import msgspec

from weft.contracts import StoreLease
from weft.deadline import Deadline
from weft.errors import RecordError
from weft.heartbeat import Heartbeat
from weft.job_store import JobStore

_LOG = logging.getLogger(__name__)
_NONCE_BYTES = 16
_KEPT = 8
"""Rolls that stay readable."""
_LONGEST_SLEEP_SECONDS = 0.05
"""Between looks at the store."""
_LEASE_SECONDS = 20.0
"""After so long without a sign of life a member does not wait any more."""


def bell(records: JobStore) -> str:
    """The key of a fleet whose value changes whenever there is something new to look for."""
    return f"{records.root}/fleet/bell"


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
        self._partial = False
        self._waiting: dict[str, int] = {}
        self._admitted: dict[str, int] = {}

    def waiting(self) -> dict[str, int]:
        """Replicas all of whose members wait to be admitted since the last time, with the largest number of their
        announcements. One operation when nobody has come since the last call.
        """
        count = self._records.store.add(f"{self._root}/announcements", 0)
        if count != self._seen or self._partial:
            members = self._announced()
            self._waiting = {}
            for replica, found in members.items():
                newest = max(found, key=lambda member: member.number)
                if sum(member.size == newest.size for member in found) == newest.size:
                    self._waiting[replica] = newest.number
            self._partial = len(self._waiting) < len(members)  # leases that run out do not count
            self._seen = count
        return self._waiting

    def _announced(self) -> Mapping[str, list[Announced]]:
        members: defaultdict[str, list[Announced]] = defaultdict(list)
        for key in self._records.store.keys(f"{self._root}/announced/"):
            try:
                found = self._records.find("announced", key, Announced)
            except RecordError as error:
                _LOG.warning("somebody waits to be admitted who cannot be: %s", error)
                continue
            if found is not None and found.number > self._admitted.get(found.replica, 0):
                members[found.replica].append(found)
        return members

    def write(self, replicas: dict[str, int], sources: tuple[bytes, ...] = ()) -> Roll:
        """The next roll. By rank 0 alone."""
        roll = Roll(self._records.store.add(f"{self._root}/rolls", 1), replicas, sources)
        self._admitted.update(replicas)
        self._waiting = {name: number for name, number in self._waiting.items() if replicas.get(name) != number}
        self._records.put("roll", f"{self._root}/roll/{roll.number}", roll)
        self._records.store.delete(f"{self._root}/roll/{roll.number - _KEPT}")
        return roll

    def read(self, number: int) -> Roll:
        """A roll that rank 0 has told of. Raises `RecordError` when it is not there any more."""
        roll = self._records.find("roll", f"{self._root}/roll/{number}", Roll)
        if roll is None:
            raise RecordError(f"roll {number} of the fleet is gone: this source is far behind that of rank 0")
        return roll

    def say(self, version: int, roll: Roll) -> None:
        """Tell of a version's roll in the store. By rank 0, when it has no cell."""
        self._records.put("at", f"{self._root}/at/{version}", roll.number)
        self._records.store.delete(f"{self._root}/at/{version - _KEPT}")

    @staticmethod
    def until(ready: Callable[[], bool], what: str, late: Callable[[], Sequence[str]], deadline: Deadline) -> None:
        """Wait for something in the store, which all sources ask: less often than what is asked here."""
        deadline.wait(ready, what, late, _LONGEST_SLEEP_SECONDS)

    def told(self, version: int) -> Roll | None:
        """The roll of a version as rank 0 has said, if it has."""
        number = self._records.find("at", f"{self._root}/at/{version}", int)
        return None if number is None else self.read(number)

    def open(self, replicas: int, deadline: Deadline) -> Roll:
        """Agree on the first roll with all sources of this life of the trainer, once so many replicas are whole.

        Raises `DeadlineError` that names the sources that did not come, or says which replicas did.
        """
        self._records.put("hello", f"{self._root}/hello/{self._rank}", self._nonce)
        return self._lead(replicas, deadline) if self._rank == 0 else self._follow(deadline)

    def _follow(self, deadline: Deadline) -> Roll:
        """Hear every opening that is for this life, since others may come later, until all have heard the same."""
        heard: list[Roll] = []

        def ready() -> bool:
            roll = self._records.find("roll", f"{self._root}/opening", Roll)
            if roll is not None and self._rank < len(roll.sources) and roll.sources[self._rank] == self._nonce:
                if roll not in heard:
                    heard.append(roll)
                    self._records.put("heard", f"{self._root}/heard/{self._rank}", roll.number)
                return self._records.find("opened", f"{self._root}/opened", int) == roll.number
            return False

        self.until(ready, "the opening of the fleet", lambda: ["the source of rank 0"], deadline)
        return heard[-1]

    def _lead(self, replicas: int, deadline: Deadline) -> Roll:
        self.until(lambda: len(self.waiting()) >= replicas, f"{replicas} replicas of the fleet", self._absent, deadline)
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

        self.until(agreed, "all sources of the fleet", lambda: self._late(roll), deadline)
        assert roll is not None, "agreed"
        self._records.put("opened", f"{self._root}/opened", roll.number)
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
    """That a member of a replica waits to be admitted: a lease, kept alive until it ends."""

    def __init__(self, records: JobStore, replica: str, member: str, size: int, seconds: float) -> None:
        """The member waits for at most so many seconds."""
        root = f"{records.root}/fleet"
        number = records.store.add(f"{root}/announcing", 1)
        key = f"{root}/announced/{quote(replica, safe='')}/{quote(member, safe='')}"

        def take() -> StoreLease:
            lease = records.lease("announced", key, Announced(replica, member, size, number), _LEASE_SECONDS)
            records.store.add(f"{root}/announcements", 1)  # after the record: whoever sees it finds that
            return lease

        self._heart = Heartbeat(f"the announcement of {member}")
        self._heart.touch(seconds)
        self._heart.hold(take)
        records.store.set(bell(records), os.urandom(_NONCE_BYTES))

    def end(self) -> None:
        """The member waits no longer. Idempotent."""
        self._heart.end()
