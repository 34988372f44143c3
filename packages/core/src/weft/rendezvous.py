"""The rendezvous: members find out who takes part, and how to reach each other, through the store.

Round one: every member publishes its layouts and announces itself; `members` waits until exactly the expected ones
are there. Round two: every member publishes its endpoint and reads those of its peers, connects, and waits until all
have: nobody begins before. Conclusions are drawn from a
log that all members read in one order (`weft.roster`), so they end with the same members or each with an error that
says why. Keys, below `weft/<job>/`:

- `incarnation/<name>`: counter, grows with every process that uses the name;
- `entries`: counter, entries of the log; `log/<n>`: entry n, from 1, which everybody reads once;
- `slice/<plan>/<name>`: slices of plans;
- `layout/<address>/…`: layouts, content-addressed; `endpoint/<name>/<incarnation>`: endpoint records;
- `ready/<members>`: counter of those who can begin, `ready/<members>/<name>`: each of them; `all-ready/<members>`:
  that all can.

Of two processes with one name the newer incarnation takes part, because a restarted member must be able to take its
old place; the older one gets an error. A member that restarts after the rendezvous was complete begins another one,
for which all others must join anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import TypeVar
from urllib.parse import quote

import msgspec
import numpy as np

from weft.authentication import Guard, Secret
from weft.content import get_content, put_content
from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError, RecordError, RendezvousError
from weft.facts import Facts
from weft.job_store import JobStore
from weft.layout import Layout
from weft.member import Member, RemoteRegion
from weft.plan import PLANNER_VERSION
from weft.roster import Action, Attempt, Event, Expect, MemberRecord, Roster

Found = TypeVar("Found")

_FIRST_LOOK_SECONDS = 0.01
_LONGEST_LOOK_SECONDS = 0.1
"""Between looks whether somebody has failed, while something else is awaited."""
_REASON_CHARACTERS = 20_000
"""Longer reasons are cut, so that the log stays small."""


class EndpointRecord(msgspec.Struct, frozen=True, array_like=True):
    """How a member is reached, and where in its regions its buffers are. New fields go to the end, with defaults.

    The columns are little-endian int64, one element per buffer in the order of the source or target layout: index
    into `regions`, and the buffer's first byte in that region. A column is empty where the member has no such layout.
    """

    name: str
    incarnation: int
    memory_epoch: int
    address: bytes
    """What `Transport.address` returned."""
    regions: tuple[RemoteRegion, ...]
    source_region: bytes
    source_offset: bytes
    target_region: bytes
    target_offset: bytes
    fingerprint: str
    """Of the plan it has made; equal on every member."""
    slots: dict[str, tuple[int, int]] = {}
    """Per member that sends it packed buckets: region and byte offset of that sender's first staging slot."""
    outgoing_slots: dict[str, tuple[int, int]] = {}
    """Per member that it sends packed buckets to: the same at this end."""
    nonce: bytes = b""
    """Random, of this life of the member (`weft.authentication.Guard`); empty without a job secret."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for columns that do not fit each other, or refer to a region that is not there."""
        sizes = [region.nbytes for region in self.regions]
        if any(not 0 <= region.address < 1 << 64 or not 0 <= region.nbytes < 1 << 63 for region in self.regions):
            raise ValueError("a region has no address, or no size")
        ends = [*self.slots.values(), *self.outgoing_slots.values()]
        sizes = sizes or [0]  # where empty buffers are
        for region, offset in ((self.source_region, self.source_offset), (self.target_region, self.target_offset)):
            if len(region) != len(offset) or len(region) % 8:
                raise ValueError("columns of regions and offsets have different lengths")
            ends += zip(*(np.frombuffer(column, "<i8").tolist() for column in (region, offset)), strict=True)
        if any(not 0 <= region < len(sizes) or not 0 <= offset <= sizes[region] for region, offset in ends):
            raise ValueError("a buffer or slot is in no region")


class Rendezvous:
    """One member's part in the rendezvous of a job. Used from one thread; every wait ends by `deadline`.

    In order: `incarnation`, `announce`, `members`, `publish_endpoint`, `endpoints`, `ready`; `fail` at any time instead
    of going on; `leave` last.
    """

    def __init__(
        self, store: Store, job: str, expect: Expect, deadline: Deadline, secret: Secret | None = None,
        announced: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`announced` is called as soon as the others can find this member."""
        if not job:
            raise ConfigError("expected the name of a job, found an empty one")
        self._store, self._job, self._expect, self._deadline = store, job, expect, deadline
        self._records = JobStore(store, job, secret)
        self._root = self._records.root
        self._announced = announced
        self._guard: Guard | None = None
        self._roster = Roster()
        self._entries_read = 0
        self._name = ""
        self._incarnation = 0
        self._fingerprint = ""

    def incarnation(self, name: str) -> int:
        """Take the name for this process; returns its incarnation, 1 for the first process of that name in this job."""
        if not name:
            raise ConfigError("expected the name of a member, found an empty one")
        self._name = name
        self._incarnation = self._store.add(f"{self._root}/incarnation/{name}", 1)
        self._guard = Guard(self._records.key, name) if self._records.key else None
        return self._incarnation

    def announce(
        self,
        member: Member,
        layouts: Mapping[str, Layout],
        policy: bytes,
        facts: Facts | None = None,
        *,
        weft_version: str | None = None,
        planner_version: int = PLANNER_VERSION,
    ) -> None:
        """Publish this member's layouts (by address) and say that it takes part; `ConfigError` when it cannot.

        `policy` is the encoded policy. The weft version is that of the installed distribution unless it is given.
        """
        self._check(member, layouts)
        for address in {member.source_layout, member.target_layout} - {None}:
            put_content(self._store, f"{self._root}/layout", layouts[str(address)].encoded)
        found = version("weft-core") if weft_version is None else weft_version
        record = MemberRecord(
            member, policy, found, planner_version, self._expect.sources, self._expect.replicas, facts or Facts()
        )
        self._append(Action.JOIN, record=record)
        self._announced()

    def members(self) -> tuple[Member, ...]:
        """Everybody who takes part, sorted by name: the same on every member. Waits for them.

        Raises `RendezvousError` when the expected members were not there by the deadline (saying who was), when there
        are too many, when they contradict each other, when one has failed, or when another process has taken this
        one's name.
        """
        return self._complete().members()

    def facts(self) -> dict[str, Facts]:
        """What everybody of `members` runs on, by name. Raises what `members` raises."""
        records = self._complete().records
        return {name: records[name].facts for name in sorted(records)}

    def layout(self, address: str) -> Layout:
        """A layout that some member announced. Raises `RecordError` when it is missing or damaged."""
        return Layout.decode(get_content(self._store, f"{self._root}/layout", address))

    def publish_slices(self, fingerprint: str, slices: Iterable[tuple[str, bytes]]) -> None:
        """Give every member (by name) its slice of a plan, encoded."""
        for name, data in slices:
            self._records.put("slice", f"{self._root}/slice/{fingerprint}/{quote(name, safe='')}", data)

    def slice(self, fingerprint: str, planner: str) -> bytes:
        """This member's slice of a plan, which `planner` publishes. Waits for it.

        Raises `DeadlineError` that names the planner when it has published none by the deadline, and `RendezvousError`
        when one of all members has failed, left or restarted.
        """
        key = f"{self._root}/slice/{fingerprint}/{quote(self._name, safe='')}"

        def look() -> bytes | None:
            data = self._records.find("slice", key, bytes)
            if data is None:
                attempt = self._own_attempt()
                if attempt is not None and planner in attempt.left:
                    raise RendezvousError(f"job {self._job!r}: {planner} left before it had planned")
            return data

        return self._until(look, lambda: key, f"the plan of job {self._job!r}", lambda: [planner])

    def publish_endpoint(self, record: EndpointRecord) -> None:
        """Say how this member is reached; again after its memory epoch has changed."""
        if (record.name, record.incarnation) != (self._name, self._incarnation):
            raise ConfigError(
                f"endpoint of {record.name}#{record.incarnation}, but this member is {self._name}#{self._incarnation}"
            )
        self._fingerprint = record.fingerprint
        if self._guard is not None:
            record = msgspec.structs.replace(record, nonce=self._guard.nonce)
        self._records.put("endpoint", self._endpoint_key(record.name, record.incarnation), record)

    def endpoints(self, names: Iterable[str]) -> dict[str, EndpointRecord]:
        """The endpoints of these members, in the order of their names. Waits for them.

        Raises `DeadlineError` that names who has published none by the deadline, and `RendezvousError` when one of
        all members has failed, left or restarted, or has made another plan than this one.
        """
        attempt = self._complete()
        wanted = sorted(set(names))
        if strangers := [name for name in wanted if name not in attempt.records]:
            raise ConfigError(
                f"endpoints of {', '.join(strangers)}: they do not take part; "
                f"members are {', '.join(sorted(attempt.records))}"
            )
        found: dict[str, EndpointRecord] = {}

        def missing() -> list[str]:
            """All but those found, one of which may have come just now."""
            return [name for name in wanted if name not in found and not take(name)]

        def take(name: str) -> bool:
            if record := self._endpoint(name, attempt.records[name].member.incarnation):
                found[name] = record
                self._check_fingerprint(record)
            return name in found

        def next_missing() -> str | None:
            return next((name for name in wanted if name not in found), None)

        def look() -> dict[str, EndpointRecord] | None:
            while (name := next_missing()) is not None and take(name):
                pass
            if name is None:
                return {name: found[name] for name in wanted}
            self._own_attempt()
            if attempt.left.difference(found) and (gone := sorted(attempt.left.intersection(missing()))):
                raise RendezvousError(f"job {self._job!r}: {', '.join(gone)} left before saying how to be reached")
            return None

        def key() -> str:
            name = next_missing() or wanted[-1]
            return self._endpoint_key(name, attempt.records[name].member.incarnation)

        return self._until(look, key, f"endpoints of job {self._job!r}", missing)

    def guard(self, endpoints: Mapping[str, EndpointRecord]) -> Guard | None:
        """What recognizes these peers over the data channel; None without a job secret."""
        if self._guard is not None:
            for name, record in endpoints.items():
                self._guard.admit(name, record.nonce)
        return self._guard

    def ready(self, check: Callable[[], None]) -> None:
        """Say that this member can begin, and wait until everybody can; `check` raises when a peer is lost meanwhile.

        So a member that fails while it connects fails them all, and none of them finds it gone later, without a reason.
        Raises `DeadlineError` that names who was not ready by the deadline, and `RendezvousError` when one of all
        members has failed or restarted.
        """
        attempt = self._complete()
        lives = {name: record.member.incarnation for name, record in attempt.records.items()}
        members = hashlib.sha256(repr(sorted(lives.items())).encode()).hexdigest()[:16]
        key, all_ready = f"{self._root}/ready/{members}", f"{self._root}/all-ready/{members}"
        self._store.set(f"{key}/{quote(self._name, safe='')}", b"")
        if self._store.add(key, 1) >= len(lives):
            self._store.set(all_ready, b"")  # wakes the others

        def look() -> bool | None:
            self._own_attempt()  # first: who has given up may have been counted
            if self._store.add(key, 0) >= len(lives):
                return True
            check()
            return None

        def late() -> list[str]:
            return [name for name in sorted(lives) if self._store.get(f"{key}/{quote(name, safe='')}") is None]

        self._until(look, lambda: all_ready, f"the start of job {self._job!r}", late)

    def fail(self, name: str, reason: str) -> None:
        """Say that this member cannot go on: whoever waits, now or later, raises `RendezvousError` with all reasons."""
        if name != self._name:
            self.incarnation(name)
        self._append(Action.FAIL, reason)

    def leave(self) -> None:
        """Say that this member has closed: its place is free."""
        if self._incarnation:
            self._append(Action.LEAVE)

    def _check(self, member: Member, layouts: Mapping[str, Layout]) -> None:
        faults = []
        if (member.name, member.incarnation) != (self._name, self._incarnation):
            faults.append(
                f"it took the name {self._name!r} with incarnation {self._incarnation}, not {member.incarnation}"
            )
        if not member.is_source and not member.is_target:
            faults.append("it has neither a source layout nor a target layout")
        if member.is_target and (not member.replica or member.replica_size < 1):
            faults.append(f"a target needs a replica and its size, found {member.replica!r} and {member.replica_size}")
        for address in (member.source_layout, member.target_layout):
            if address is not None and (address not in layouts or layouts[address].address != address):
                faults.append(f"layout {address} is not among those given")
        if faults:
            raise ConfigError(f"member {member.name!r} cannot take part: {'; '.join(faults)}")

    def _complete(self) -> Attempt:
        """This process's attempt, once it is complete."""
        attempt = self._own_attempt()
        while attempt is None or not attempt.complete:
            if not self._read(self._deadline):
                return self._give_up()
            attempt = self._found()
        return attempt

    def _give_up(self) -> Attempt:
        """Tell the others that this member waits no longer; the log decides whether the last one came before."""
        attempt = self._roster.attempt(self._name, self._incarnation)
        shortfall = "this member was not announced" if attempt is None else attempt.shortfall(self._expect)
        reason = f"not everybody came within {self._deadline.seconds:.1f} s: {shortfall}"
        self._append(Action.LATE, reason)
        attempt = self._own_attempt()
        if attempt is None or not attempt.complete:
            raise RendezvousError(
                f"job {self._job!r}: {reason}; entry {self._entries_read + 1} of the log is missing: use a new job name"
            )
        return attempt

    def _own_attempt(self) -> Attempt | None:
        """Read on in the log, as far as it goes; then `_found`."""
        while self._read():
            pass
        return self._found()

    def _found(self) -> Attempt | None:
        """This process's attempt in what was read, None before its entry. Raises when it has no future."""
        newest = self._roster.newest.get(self._name, 0)
        if newest > self._incarnation:
            raise RendezvousError(
                f"job {self._job!r}: another process joined as {self._name!r} (incarnation {newest}; "
                f"this one is {self._incarnation}). If that is no restart, two members have one name: give each its own"
            )
        if reason := self._roster.refused.get((self._name, self._incarnation)):
            raise RendezvousError(f"job {self._job!r}: {reason}")
        attempt = self._roster.attempt(self._name, self._incarnation)
        if attempt is not None and attempt.reasons:
            raise RendezvousError(f"job {self._job!r}: the members cannot come together:\n{attempt.failure()}")
        return attempt

    def _read(self, wait: Deadline | None = None) -> bool:
        """Take in the next entry of the log; whether there was one, at the deadline if one is given."""
        key = self._log_key(self._entries_read + 1)
        data = self._store.get(key) if wait is None else self._store.watch(key, None, wait)
        if data is None:
            return False
        self._roster.apply(self._records.opened("rendezvous", key, Event, data))
        self._entries_read += 1
        return True

    def _append(self, action: Action, reason: str = "", record: MemberRecord | None = None) -> None:
        event = Event(action, self._name, self._incarnation, reason[:_REASON_CHARACTERS], record)
        self._records.check("rendezvous", event)  # before it has a number, which an entry must have
        self._records.put("rendezvous", self._log_key(self._store.add(f"{self._root}/entries", 1)), event)

    def _log_key(self, entry: int) -> str:
        return f"{self._root}/log/{entry}"

    def _endpoint(self, name: str, incarnation: int) -> EndpointRecord | None:
        key = self._endpoint_key(name, incarnation)
        record = self._records.find("endpoint", key, EndpointRecord)
        if record is not None and (record.name, record.incarnation) != (name, incarnation):
            raise RecordError(f"{key}: expected {name}#{incarnation}, found {record.name}#{record.incarnation}")
        return record

    def _endpoint_key(self, name: str, incarnation: int) -> str:
        return f"{self._root}/endpoint/{name}/{incarnation}"

    def _check_fingerprint(self, record: EndpointRecord) -> None:
        if self._fingerprint not in ("", record.fingerprint):
            raise RendezvousError(
                f"job {self._job!r}: plans differ: {self._fingerprint} at {self._name}; "
                f"{record.fingerprint} at {record.name}"
            )

    def _until(
        self, look: Callable[[], Found | None], key: Callable[[], str], what: str, late: Callable[[], list[str]]
    ) -> Found:
        """What `look` finds at last; `key` says what it waits for. Fails for all members when it finds nothing by the
        deadline.
        """
        look_seconds = _FIRST_LOOK_SECONDS
        while True:
            expired = self._deadline.expired()
            if (found := look()) is not None:
                return found
            if expired:
                names = late()
                self._append(Action.FAIL, str(DeadlineError(what, self._deadline.seconds, names)))
                raise DeadlineError(what, self._deadline.seconds, names)
            self._store.watch(key(), None, Deadline.after(min(look_seconds, self._deadline.remaining())))
            look_seconds = min(2 * look_seconds, _LONGEST_LOOK_SECONDS)
