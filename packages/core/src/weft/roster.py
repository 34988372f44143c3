"""Who takes part: a pure state machine over the log of a job's rendezvous.

Members append events to one log in the store and every member applies them in the log's order, so all of them come to
the same conclusion at the same entry, whatever they read when. The log of a job holds *attempts*, one after the
other: an attempt gathers members until exactly the expected ones are there (then it is complete) or something
contradicts (then it has failed); whoever comes back with a new incarnation after that begins the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import msgspec

from weft.errors import ConfigError
from weft.facts import Facts
from weft.member import Member
from weft.tally import Entry, Tally


@dataclass(frozen=True, slots=True)
class Expect:
    """How many take part. Members that expect different numbers do not come together."""

    sources: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "members"})]
    """Members that send, over all of the trainer."""
    replicas: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "replicas"})]
    """Replicas that receive, each whole. Its members tell a replica's size (`Member.replica_size`)."""

    def __post_init__(self) -> None:
        if self.sources < 1 or self.replicas < 1:
            raise ConfigError(f"expected at least 1 source and 1 replica, found {self}")


class MemberRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a member says about itself in the first round. New fields go to the end, with defaults."""

    member: Member
    policy: bytes
    """Its policy, encoded; equal on every member."""
    weft_version: str
    planner_version: int
    sources: int
    """`Expect.sources` of this member."""
    replicas: int
    """`Expect.replicas` of this member."""
    facts: Facts = Facts()
    """What it runs on; members need not agree about it."""


class Action(StrEnum):
    """What an event says."""

    JOIN = "join"
    """A member is ready to take part."""
    FAIL = "fail"
    """A member cannot go on; nobody needs to wait for it."""
    LATE = "late"
    """A member's deadline passed before everybody was there."""
    LEAVE = "leave"
    """A member has closed."""


class Event(msgspec.Struct, frozen=True, array_like=True):
    """An entry of the log. New fields go to the end, with defaults."""

    action: Action
    name: str
    incarnation: int
    reason: str = ""
    """Of `fail` and `late`."""
    record: MemberRecord | None = None
    """Of `join`."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One gathering of members."""

    records: dict[str, MemberRecord] = field(default_factory=dict)
    """By name: whoever is there, in its newest incarnation."""
    seen: dict[str, int] = field(default_factory=dict)
    """Newest incarnation of everybody who said anything in this attempt."""
    left: set[str] = field(default_factory=set)
    """Names of those who closed."""
    reasons: list[tuple[str, str]] = field(default_factory=list)
    """(name or nothing, reason) why the attempt cannot be used; empty while it can."""
    replaced: list[str] = field(default_factory=list)
    """Members that another process of the same name has taken the place of."""
    complete: bool = False
    """Whether exactly the expected members are there; once true it stays true."""
    tally: Tally = field(default_factory=Tally)
    """Of `records`."""

    def members(self) -> tuple[Member, ...]:
        """Members, sorted by name."""
        return tuple(self.records[name].member for name in sorted(self.records))

    def failure(self) -> str:
        """All reasons, one a line, equal ones once."""
        names: dict[str, list[str]] = {}
        for name, reason in self.reasons:
            names.setdefault(reason, []).extend([name] if name else [])
        return "\n".join(f"  {', '.join(who)}: {reason}" if who else f"  {reason}" for reason, who in names.items())

    def shortfall(self, expect: Expect) -> str:
        """Who is there and who is missing."""
        sources, replicas = _sides(self.records)
        parts = [f"{len(sources)} of {expect.sources} sources{_named(sources)}"]
        parts.append(f"{len(replicas)} of {expect.replicas} replicas{_named(sorted(replicas))}")
        for replica, names in sorted(replicas.items()):
            size = self.records[names[0]].member.replica_size
            if len(names) < size:
                parts.append(f"replica {replica} has {len(names)} of {size} members{_named(names)}")
        return "; ".join(["found " + ", ".join(parts), *self.replaced])


@dataclass(slots=True, eq=False)
class Roster:
    """The conclusions of the log so far."""

    newest: dict[str, int] = field(default_factory=dict)
    """Newest incarnation per name."""
    refused: dict[tuple[str, int], str] = field(default_factory=dict)
    """Why a (name, incarnation) came in vain to an attempt that was complete and in use."""
    _attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)
    _current: Attempt = field(default_factory=Attempt)

    def attempt(self, name: str, incarnation: int) -> Attempt | None:
        """The attempt that this process joined, or None before its entry has been applied."""
        return self._attempts.get((name, incarnation))

    def apply(self, event: Event) -> None:
        """Apply the next entry of the log. Entries of a process that another of its name has replaced do nothing."""
        if event.incarnation < self.newest.get(event.name, 0):
            return
        self.newest[event.name] = event.incarnation
        attempt = self._current
        if _begins_anew(attempt, event):
            if attempt.complete and event.name in attempt.records:
                attempt.reasons.append(("", f"{event.name} came back as incarnation {event.incarnation}: join again"))
            attempt = self._current = Attempt()
        self._attempts[event.name, event.incarnation] = attempt
        if attempt.complete and event.name not in attempt.records:
            if event.record is not None:
                self.refused[event.name, event.incarnation] = _extra(attempt, event.record.member)
            return
        attempt.seen[event.name] = event.incarnation
        match event.action:
            case Action.JOIN if event.record is not None and not attempt.reasons:
                _join(attempt, event.record)
            case Action.FAIL:
                attempt.reasons.append((event.name, event.reason))
            case Action.LATE if not attempt.complete and not attempt.reasons:
                attempt.reasons.append((event.name, event.reason))
            case Action.LEAVE:
                attempt.left.add(event.name)
                if not attempt.complete and (gone := attempt.records.pop(event.name, None)):
                    attempt.tally.remove(_entry(gone))
            case _:
                pass


def _begins_anew(attempt: Attempt, event: Event) -> bool:
    """Whether an event belongs to the attempt after this one."""
    if not attempt.complete and not attempt.reasons:
        return False
    if event.name in attempt.seen:
        return event.incarnation > attempt.seen[event.name]
    if event.record is None or not attempt.complete:
        return False
    other = next(iter(attempt.records.values()))
    return bool(attempt.left) or _expect(event.record) != _expect(other)


def _join(attempt: Attempt, record: MemberRecord) -> None:
    name = record.member.name
    if name in attempt.records:
        before = attempt.records[name]
        old = before.member
        attempt.replaced.append(
            f"{name} of incarnation {old.incarnation} on {old.host} was replaced by incarnation "
            f"{record.member.incarnation} on {record.member.host} (a restart, or two processes of one name)"
        )
        attempt.tally.remove(_entry(before))
    attempt.left.discard(name)
    attempt.records[name] = record
    attempt.tally.add(_entry(record))
    if attempt.tally.contradicts:
        attempt.reasons.extend(("", fault) for fault in _contradictions(attempt.records))
    attempt.complete = attempt.tally.whole


def _entry(record: MemberRecord) -> Entry:
    member = record.member
    agreed = (record.weft_version, record.planner_version, _readable(record.policy))
    replica = (member.replica or "") if member.is_target else None
    return Entry(agreed, _expect(record), member.is_source, replica, member.replica_size)


def _contradictions(records: dict[str, MemberRecord]) -> list[str]:
    """Everything about which the members that are there cannot agree, however many more come."""
    faults = [
        *_differences("weft versions", records, lambda record: record.weft_version),
        *_differences("planner versions", records, lambda record: str(record.planner_version)),
        *_differences("policies", records, lambda record: _readable(record.policy)),
        *_differences("expectations", records, lambda record: "{} sources and {} replicas".format(*_expect(record))),
    ]
    sources, replicas = _sides(records)
    for replica, names in sorted(replicas.items()):
        own = {name: records[name] for name in names}
        sizes = _differences(f"sizes of replica {replica}", own, lambda record: str(record.member.replica_size))
        size = records[names[0]].member.replica_size
        if not sizes and len(names) > size:
            sizes = [f"replica {replica}: expected {size} members, found {len(names)}{_named(names)}"]
        faults += sizes
    if len({_expect(record) for record in records.values()}) == 1:
        expected_sources, expected_replicas = _expect(next(iter(records.values())))
        if len(sources) > expected_sources:
            faults.append(f"too many sources: expected {expected_sources}, found {len(sources)}{_named(sources)}")
        if len(replicas) > expected_replicas:
            faults.append(
                f"too many replicas: expected {expected_replicas}, found {len(replicas)}{_named(sorted(replicas))}"
            )
    return faults


def _differences(what: str, records: dict[str, MemberRecord], value: Callable[[MemberRecord], str]) -> list[str]:
    holders: dict[str, list[str]] = {}
    for name in sorted(records):
        holders.setdefault(value(records[name]), []).append(name)
    if len(holders) < 2:
        return []
    return [
        f"{what} differ: " + "; ".join(f"{found} at {', '.join(names)}" for found, names in sorted(holders.items()))
    ]


def _sides(records: dict[str, MemberRecord]) -> tuple[list[str], dict[str, list[str]]]:
    """Names of sources, and names of targets by replica, all sorted."""
    replicas: dict[str, list[str]] = {}
    for name in sorted(records):
        if records[name].member.is_target:
            replicas.setdefault(records[name].member.replica or "", []).append(name)
    return [name for name in sorted(records) if records[name].member.is_source], replicas


def _expect(record: MemberRecord) -> tuple[int, int]:
    return record.sources, record.replicas


def _extra(attempt: Attempt, member: Member) -> str:
    return (
        f"too many members: the job was complete with {', '.join(sorted(attempt.records))} when {member.name} came; "
        "start as many members as expected, or give this one another job name"
    )


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _readable(policy: bytes) -> str:
    try:
        return str(msgspec.msgpack.decode(policy))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return policy.hex()
