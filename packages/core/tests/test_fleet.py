"""Fleets: replicas that come late, leave, die and come back otherwise, while the trainer goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest

from weft.authentication import Secret
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, RefitAbortedError, WeftError
from weft.fleet import Fleet, FleetMember, FleetReport
from weft.fleet.roll import Announcement, Roll, RollBook
from weft.job_store import JobStore
from weft.local import LocalHub, LocalTransport
from weft.member import Member
from weft.policy import Policy
from weft.rendezvous import Rendezvous
from weft.report import Report
from weft.stores import open_store
from weft.testing.members import Hook, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

JOBS = count()
TINY = Tiny()
PATIENT = Deadlines(rendezvous=60, offer=60, begin=60, move=60, vote=60, commit=60)


@dataclass(eq=False)
class Stage:
    """A trainer of two ranks in threads, which go through versions in step until they are told to stop."""

    url: str
    job: str = field(default_factory=lambda: f"fleet{next(JOBS)}")
    hub: LocalHub = field(default_factory=LocalHub)
    reports: dict[int, FleetReport | RefitAbortedError] = field(default_factory=dict)
    """Of rank 0, by version."""
    ended: dict[int, Mapping[str, str | None]] = field(default_factory=dict)
    """Outcomes by version."""
    errors: list[BaseException] = field(default_factory=list)
    first: int = 1
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._step = threading.Barrier(2, timeout=60)
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._play, args=(rank,), daemon=True) for rank in range(2)]

    def options(self, name: str) -> dict[str, Any]:
        return {
            "store": self.url, "job": self.job, "name": name, "transport": "local", "policy": self.policy,
            "transport_options": {"hub": self.hub}, "deadlines": PATIENT, "host": "here",
        }  # fmt: skip

    def start(self, replicas: int = 1) -> None:
        self._replicas = replicas
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "the trainer does not end"
        assert not self.errors

    def until(self, reached: Callable[[], bool], what: str) -> None:
        """Wait until something is true of what has been reported."""
        with self._changed:
            assert self._changed.wait_for(lambda: reached() or self.errors, 60), f"{what}: {self.reports}"
        assert not self.errors

    def _play(self, rank: int) -> None:
        try:
            self._train(rank)
        except BaseException as error:
            self.errors.append(error)
            self._step.abort()
            with self._changed:
                self._changed.notify_all()
            raise

    def _train(self, rank: int) -> None:
        source = MemorySource(f"trainer/{rank}", TINY.source(rank, 2))
        fleet = Fleet(source=source, rank=rank, sources=2, replicas=self._replicas, **self.options(source.name))
        with fleet:
            for version in count(self.first):
                if self._step.wait() == 0:
                    self._stopping = self._stop.is_set()
                self._step.wait()
                if self._stopping:
                    return
                source.load(TINY.tensors(version))
                offer = fleet.offer(version)
                offer.released()
                assert not any(lease.held for lease in source.leases)
                source.load(TINY.tensors(0))
                report = self._ended(offer)
                if rank == 0:
                    with self._changed:
                        self.reports[version], self.ended[version] = report, offer.outcomes
                        self._changed.notify_all()

    def _ended(self, offer: Any) -> FleetReport | RefitAbortedError:
        try:
            report: FleetReport = offer.committed()
        except RefitAbortedError as error:
            return error
        return report

    def installed(self, replica: str) -> list[int]:
        """Versions that a replica has committed."""
        return [v for v, outcomes in self.ended.items() if outcomes.get(replica, "absent") is None]


@dataclass(eq=False)
class Replica:
    """Members in threads that receive `versions` versions, or until they fail, and then leave."""

    stage: Stage
    name: str
    size: int = 1
    versions: int = 1 << 30
    before: Mapping[int, Hook] = field(default_factory=dict)
    received: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, BaseException] = field(default_factory=dict)
    ranks: Sequence[int] | None = None
    """Those that `start` need not be called for; None for all."""

    def __post_init__(self) -> None:
        self._threads: dict[int, threading.Thread] = {}
        for rank in range(self.size) if self.ranks is None else self.ranks:
            self.start(rank)

    def start(self, rank: int) -> None:
        name = f"{self.name}/{rank}"
        self._threads[rank] = threading.Thread(target=self._serve, args=(rank,), name=name, daemon=True)
        self._threads[rank].start()

    def end_of(self, rank: int) -> BaseException:
        self._threads[rank].join(90)
        return self.ends.pop(rank)

    def join(self) -> None:
        for thread in self._threads.values():
            thread.join(90)
            assert not thread.is_alive(), f"{self.name} does not end"

    def _serve(self, rank: int) -> None:
        name = f"{self.name}/{rank}"
        target = MemoryTarget(name, TINY.target(rank, self.size), before=self.before.get(rank))
        received = self.received.setdefault(rank, [])
        try:
            with FleetMember(
                target=target, replica=self.name, replica_size=self.size, sources=2, **self.stage.options(name)
            ) as member:
                for _ in range(self.versions):
                    target.poison()
                    report: Report = member.receive()
                    wanted = TINY.expected(rank, self.size, TINY.tensors(report.version))
                    assert not mismatches(target.contents(), wanted)
                    received.append(report.version)
        except BaseException as error:  # noqa: BLE001  # the test looks at it
            self.ends[rank] = error


@pytest.fixture
def stage(store_url: str) -> Iterator[Stage]:
    return Stage(store_url)


@pytest.mark.trap(49)
def test_replicas_come_late_leave_and_come_back_with_another_layout(stage: Stage) -> None:
    first = Replica(stage, "first", size=2)
    stage.start()
    stage.until(lambda: len(stage.installed("first")) >= 2, "the first replica takes versions")
    late = Replica(stage, "late", versions=3)
    stage.until(lambda: len(stage.installed("late")) >= 3, "a late replica takes versions")
    late.join()
    assert not late.ends
    again = Replica(stage, "late", size=3, versions=2)
    stage.until(lambda: len(stage.installed("late")) >= 5, "it comes back with other members")
    again.join()
    assert not again.ends
    assert [len(versions) for versions in again.received.values()] == [2, 2, 2]
    seen = max(stage.reports)
    stage.until(lambda: max(stage.reports) > seen + 1, "the trainer goes on")
    stage.stop()
    first.join()
    taken = stage.installed("first")
    assert taken == sorted(stage.reports), "the first replica has missed none"
    assert all(versions[: len(taken)] == taken for versions in first.received.values())


@pytest.mark.trap(48, 64)
def test_who_dies_takes_no_other_replica_along_and_may_come_back(stage: Stage) -> None:
    def dies(what: str, argument: object) -> None:
        if (what, argument) == ("begin", 3):
            raise KeyboardInterrupt("killed")

    stage.start(replicas=2)
    steady, struck = Replica(stage, "steady"), Replica(stage, "struck", size=2, before={1: dies})
    stage.until(lambda: 4 in stage.reports, "the trainer goes on after the loss")
    struck.join()
    assert isinstance(struck.ends[1], KeyboardInterrupt)
    assert isinstance(struck.ends[0], WeftError)
    aborted = stage.reports[3]
    assert isinstance(aborted, RefitAbortedError)
    assert "struck" in str(aborted)
    assert "steady" not in str(aborted)
    back = Replica(stage, "struck", size=2, versions=2)
    stage.until(lambda: len([v for v in stage.installed("struck") if v > 3]) >= 2, "it comes back")
    back.join()
    assert not back.ends
    stage.stop()
    steady.join()
    assert steady.received[0] == sorted(stage.reports)


def test_a_replica_whose_cell_came_to_nothing_is_admitted_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before its own patience ends."""
    original, failed = Rendezvous.endpoints, threading.Event()

    def endpoints(rendezvous: Rendezvous, *arguments: Any) -> Any:
        if rendezvous._name == "trainer/1" and rendezvous._job.endswith("/late") and not failed.is_set():
            failed.set()
            raise DeadlineError("endpoints", 1.0, ["late/0"])
        return original(rendezvous, *arguments)

    monkeypatch.setattr(Rendezvous, "endpoints", endpoints)
    early = Replica(stage, "early")
    stage.start()
    stage.until(lambda: 1 in stage.reports, "the first version")
    late = Replica(stage, "late", size=2, versions=2)
    stage.until(lambda: bool(stage.installed("late")), "the late replica")
    assert failed.is_set()
    late.join()
    assert not late.ends
    stage.stop()
    early.join()


def test_who_waits_for_one_that_died_while_it_joined_tries_again_soon(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `begin`, and not after the patience for being admitted."""
    original, limits = LocalTransport.connect, list[float]()
    brisk = replace(PATIENT, begin=5.0)
    monkeypatch.setattr(f"{__name__}.PATIENT", brisk)

    def connect(transport: LocalTransport, peer: Member, address: bytes, deadline: Deadline) -> None:
        if threading.current_thread().name == "late/0" and not limits:
            limits.append(deadline.seconds)
            raise DeadlineError(f"connecting to {peer.name}", deadline.seconds, [peer.name])
        original(transport, peer, address, deadline)

    monkeypatch.setattr(LocalTransport, "connect", connect)
    early = Replica(stage, "early")
    stage.start()
    stage.until(lambda: 1 in stage.reports, "the first version")
    late = Replica(stage, "late", versions=2)
    late.join()
    assert not late.ends
    assert limits == [brisk.begin]
    stage.stop()
    early.join()


def test_who_comes_back_while_the_sources_join_its_former_life_is_not_left_behind(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its own patience ends."""
    announce, endpoints, fail = Rendezvous.announce, Rendezvous.endpoints, Rendezvous.fail
    lives, tried, gone = count(1), set[str](), threading.Semaphore(0)

    def slow(rendezvous: Rendezvous, *arguments: Any) -> None:
        life = next(lives) if rendezvous._name == "late/0" else 0
        if life == 2:  # a slow one: sources that come meanwhile meet the first life, and whoever met it goes again
            for _ in range(3):
                gone.acquire(timeout=1.0)
        announce(rendezvous, *arguments)
        if life == 1:
            raise SystemExit("it is killed")

    def given_up(rendezvous: Rendezvous, *arguments: Any) -> Any:
        name = rendezvous._name
        if name.startswith("trainer/") and rendezvous._job.endswith("/late") and name not in tried:
            tried.add(name)
            raise DeadlineError("endpoints", 1.0, ["late/0"])
        return endpoints(rendezvous, *arguments)

    def failed(rendezvous: Rendezvous, *arguments: Any) -> None:
        fail(rendezvous, *arguments)
        gone.release()

    monkeypatch.setattr(Rendezvous, "announce", slow)
    monkeypatch.setattr(Rendezvous, "endpoints", given_up)
    monkeypatch.setattr(Rendezvous, "fail", failed)
    early = Replica(stage, "early")
    stage.start()
    stage.until(lambda: 1 in stage.reports, "the first version")
    late = Replica(stage, "late", size=2, versions=2, ranks=[0])
    late.end_of(0)
    late.start(0)
    late.start(1)
    stage.until(lambda: bool(stage.installed("late")), "the late replica")
    late.join()
    assert not late.ends
    stage.stop()
    early.join()


def test_a_fleet_may_be_empty_for_a_while(stage: Stage) -> None:
    only = Replica(stage, "only", versions=2)
    stage.start()
    only.join()
    assert not only.ends
    stage.until(lambda: len([v for v in stage.reports if not stage.ended[v]]) >= 3, "versions for nobody")
    again = Replica(stage, "only", versions=2)
    again.join()
    assert not again.ends
    stage.stop()


@pytest.mark.trap(64)
def test_a_trainer_that_restarts_goes_on_counting(store_url: str) -> None:
    first = Stage(store_url)
    replica = Replica(first, "rollout", size=2)
    first.start()
    first.until(lambda: len(first.installed("rollout")) >= 2, "versions before the restart")
    first.stop()
    replica.join()
    assert all(isinstance(end, WeftError) for end in replica.ends.values())
    second = Stage(store_url, job=first.job, hub=first.hub, first=max(first.reports) + 1)
    again = Replica(second, "rollout", size=2, versions=2)
    second.start()
    again.join()
    assert not again.ends
    second.stop()
    assert again.received[0] == again.received[1] == [second.first, second.first + 1]


@pytest.mark.trap(75)
def test_warm_versions_use_the_store_as_often_as_there_are_replicas(stage: Stage) -> None:
    replicas = [Replica(stage, f"replica{n}") for n in range(3)]
    stage.start(replicas=3)
    stage.until(lambda: len(stage.reports) >= 4, "warm versions")
    stage.stop()
    for replica in replicas:
        replica.join()
    for version in (2, 3, 4):
        report = stage.reports[version]
        assert isinstance(report, FleetReport)
        assert report.store_operations == 2 * 3 + 1


def test_the_source_of_rank_0_is_the_first_by_name(store_url: str) -> None:
    stage = Stage(store_url)
    replica = Replica(stage, "rollout")
    raised: dict[int, Exception] = {}

    def train(rank: int) -> None:
        source = MemorySource(f"trainer/{1 - rank}", TINY.source(1 - rank, 2))
        try:
            with Fleet(source=source, rank=rank, sources=2, **stage.options(source.name)):
                pass
        except ConfigError as error:
            raised[rank] = error

    threads = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert "must be the first by name, but that is trainer/0: trainer/1 has rank 0" in str(raised[0])
    assert "trainer/0 has rank 1" in str(raised[1])
    replica.join()


def test_who_does_not_come_is_named(store_url: str) -> None:
    stage = Stage(store_url)
    source = MemorySource("trainer/0", TINY.source(0, 2))
    brisk = {**stage.options("trainer/0"), "deadlines": Deadlines(rendezvous=0.3)}
    with pytest.raises(DeadlineError, match="there are none"):
        Fleet(source=source, rank=0, sources=2, **brisk).open()
    with pytest.raises(ConfigError, match="rank is 2, expected 0 to 1"):
        Fleet(source=source, rank=2, sources=2, **brisk)
    with pytest.raises(ConfigError, match="the fleet is not open"):
        Fleet(source=source, rank=0, sources=2, **brisk).offer(1)


def test_sources_of_a_new_life_may_come_one_after_the_other(store_url: str) -> None:
    for number in range(2):
        rolls: dict[int, Roll] = {}

        def play(rank: int, rolls: dict[int, Roll] = rolls) -> None:
            with closing(open_store(store_url, Deadline.after(60))) as store:
                rolls[rank] = RollBook(JobStore(store, "lives"), rank, 3).open(0, Deadline.after(60))

        threads = [threading.Thread(target=play, args=(rank,), daemon=True) for rank in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.2)  # in the second life rank 0 finds what the others said in the first
        for thread in threads:
            thread.join(60)
        assert len(rolls) == 3, f"life {number}"
        assert len({roll.number for roll in rolls.values()}) == 1


def test_announcements_that_nobody_can_read_hinder_nobody(store_url: str) -> None:
    records = JobStore(open_store(store_url, Deadline.after(60)), "strangers")
    stranger = JobStore(records.store, "strangers", Secret("a secret that is not the job's"))
    announcements = [
        Announcement(stranger, "stranger", "stranger/0", 1, 60), Announcement(records, "one", "one/0", 1, 60),
    ]  # fmt: skip
    assert RollBook(records, 0, 1).waiting().keys() == {"one"}
    for announcement in announcements:
        announcement.end()
    assert not RollBook(records, 0, 1).waiting()
    records.store.close()
