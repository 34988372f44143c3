"""What happens before what, as recorded by all members, while in every version another one is late at random moments.

With `WEFT_ORDER_VERSIONS` as many versions are tried, from `WEFT_ORDER_FIRST` on. A failure names the version, which
decides who is late.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from itertools import count
from random import Random, random, uniform
from typing import Any

import pytest

from weft.contracts import Bucket, Message
from weft.member import Tag
from weft.policy import Policy
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft.testing.faults import FaultyTransport, Script
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.members import MemoryControl, MemoryLease, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

VERSIONS = int(os.environ.get("WEFT_ORDER_VERSIONS", "12"))
FIRST = int(os.environ.get("WEFT_ORDER_FIRST", "1"))
JOBS = count()
TINY = Tiny()
SOURCES = ("trainer/0", "trainer/1")
REPLICAS = {"one": ("one/0",), "two": ("two/0", "two/1")}
MEMBERS = (*SOURCES, *REPLICAS["one"], *REPLICAS["two"])
POLICIES = {
    "in place": Policy(direct_run_bytes=1 << 40, bucket_bytes=4096, staging_bytes=65_536),
    "shadow": Policy(landing="shadow"),
    "relayed": Policy(relay="host"),
}


class Record:
    """What has happened, with its time, and who is late now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: dict[tuple[int, str, str], list[float]] = {}

    def add(self, version: int, member: str, what: str, at: float | None = None) -> None:
        with self._lock:
            self._times.setdefault((version, member, what), []).append(time.monotonic() if at is None else at)

    def first(self, version: int, members: Iterable[str], what: str) -> float:
        """When the first of these members did it."""
        return min(min(self._times[version, member, what]) for member in members)

    def last(self, version: int, members: Iterable[str], what: str) -> float:
        """When the last of these members did it for the last time."""
        return max(max(self._times[version, member, what]) for member in members)

    def all(self, version: int, what: str) -> dict[str, list[float]]:
        """When who did what begins so, by all that it is."""
        found = {(m, k): at for (v, m, k), at in self._times.items() if v == version and k.startswith(what)}
        return {f"{member} {kind}": at for (member, kind), at in found.items()}


def lag(version: int, member: str) -> None:
    """Wait a little, sometimes, if this is the member that is late in this version."""
    if Random(version).choice(MEMBERS) == member and random() < 0.3:
        time.sleep(uniform(0, 0.004))


class Watch(Script):
    """Notes when a member posts, and makes it late."""

    def __init__(self, record: Record, member: str) -> None:
        self._record, self._member = record, member

    def posting(self, bucket: Bucket, tag: Tag) -> None:
        lag(tag.version, self._member)
        self._record.add(tag.version, self._member, f"post to {bucket.peer}")

    def signalling(self, peer: str, tag: Tag, note: bytes) -> bool:
        lag(tag.version, self._member)
        return True

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        for message in messages:
            lag(message.tag.version, self._member)
        return messages


class Noted(MemorySource):
    """A source that notes when its promise begins and ends."""

    def __init__(self, record: Record, name: str, rank: int) -> None:
        super().__init__(name, TINY.source(rank, len(SOURCES)))
        self._record = record

    def hold(self, version: int) -> MemoryLease:
        lag(version, self.name)
        lease = super().hold(version)
        self._record.add(version, self.name, "hold")
        release = lease.release

        def noted() -> None:
            self._record.add(version, self.name, "release")
            release()

        lease.release = noted  # type: ignore[method-assign]
        return lease


def noting(record: Record, member: str, now: Callable[[], int]) -> Callable[[str, object], None]:
    """A hook of a target or a control: late first, then noted."""

    def before(what: str, argument: object) -> None:
        version = argument if isinstance(argument, int) else now()
        lag(version, member)
        record.add(version, member, what)

    return before


def train(source: Noted, record: Record) -> Callable[[Refit], None]:
    def act(refit: Refit) -> None:
        for version in range(FIRST, FIRST + VERSIONS):
            source.load(TINY.tensors(version))
            offer = refit.offer(version)
            offer.released()
            source.load(TINY.tensors(0))
            note(record, source.name, offer.committed())

    return act


def note(record: Record, member: str, report: Report) -> None:
    for at, what in report.events:
        record.add(report.version, member, what, at)


def serve(target: MemoryTarget, record: Record, expected: Any, at: list[int]) -> Callable[[Refit], None]:
    def act(refit: Refit) -> None:
        for version in range(FIRST, FIRST + VERSIONS):
            at[0] = version
            note(record, target.name, refit.receive(version))
            assert not mismatches(target.contents(), expected(TINY.tensors(version)))

    return act


@pytest.mark.trap(43, 44, 45, 50)
@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_nothing_happens_before_everybody_is_ready_for_it(store_url: str, policy: Policy) -> None:
    record, parts = Record(), []
    for rank, name in enumerate(SOURCES):
        source = Noted(record, name, rank)
        parts.append(Part(name, train(source, record), source=source, host="far", script=Watch(record, name)))
    for replica, members in REPLICAS.items():
        for rank, name in enumerate(members):
            share, at = ((0, 1) if policy.relay == "host" else (rank, len(members))), [0]
            hook = noting(record, name, lambda at=at: at[0])
            target = MemoryTarget(name, TINY.target(*share), before=hook)
            control = MemoryControl(name, before=hook) if rank == 0 else None
            act = serve(target, record, lambda tensors, share=share: TINY.expected(*share, tensors), at)
            parts.append(
                Part(
                    name, act, target=target, control=control, replica=replica, replica_size=len(members), host="near",
                    script=Watch(record, name),
                )
            )  # fmt: skip
    job = Job(store_url, Expect(len(SOURCES), len(REPLICAS)), policy=policy, name=f"order{next(JOBS)}")
    all_succeeded(job.run(parts, seconds=60 + VERSIONS))
    assert any("post to two/0" in what for what in record.all(FIRST, "post to") if what.startswith("two/1")) == (
        policy.relay == "host"
    ), "targets pass on what they have where they are asked to"
    for version in range(FIRST, FIRST + VERSIONS):
        for members in REPLICAS.values():
            in_order(record, version, members, shadow=policy.shadow)
        for source in SOURCES:
            posts = [t for what, at in record.all(version, "post to").items() if what.startswith(source) for t in at]
            released = record.first(version, [source], "release")
            assert max(posts) < released, f"version {version}: {source} reads what it has released"
            for replica in REPLICAS:
                told = record.all(version, f"sent {replica}") | record.all(version, f"outcome {replica}")
                done = min(t for what, at in told.items() if what.startswith(source) for t in at)
                assert done < released, f"version {version}: {source} is released before {replica} has its bytes"


def in_order(record: Record, version: int, members: tuple[str, ...], *, shadow: bool) -> None:
    """Each step of one replica comes after the one before it at every member of it."""
    where, leader = f"version {version}, {members}", members[:1]
    posts = [t for what, at in record.all(version, "post to").items() if what.split()[-1] in members for t in at]
    paused, resumed = record.last(version, leader, "pause"), record.first(version, leader, "resume")
    for done, follows in (("verified", "prepare_commit"), ("prepared", "commit"), ("committed", "installed")):
        early = record.last(version, members, done) > record.first(version, members, follows)
        assert not early, f"{where}: {follows} before all have {done}"
    assert record.last(version, SOURCES, "hold") < record.first(version, members, "begun"), f"{where}: offered too soon"
    assert record.last(version, members, "begun") < min(posts), f"{where}: bytes move before all have begun"
    assert record.last(version, members, "committed") < resumed, f"{where}: resumed before all have installed it"
    if shadow:
        assert record.last(version, members, "verified") < paused, f"{where}: paused before all have every byte"
    changes = [record.first(version, members, "land"), *([] if shadow else posts)]
    assert paused < min(changes), f"{where}: what is served changes before the pause"
    assert record.last(version, members, "land") < resumed, f"{where}: something lands in what is served"
    if version > FIRST:
        early = record.last(version - 1, members, "committed") > record.first(version, members, "begun")
        assert not early, f"{where}: begun before the last version is installed by all"
