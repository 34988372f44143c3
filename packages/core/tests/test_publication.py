"""Published versions: trainers that go on, replicas that read in their own time, from whoever holds a version."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import torch

import weft.publication.holders
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError
from weft.job_store import JobStore
from weft.local import LocalHub
from weft.policy import Policy
from weft.publication import Publisher, Subscriber
from weft.publication.holders import Directory
from weft.report import Report
from weft.stores import open_store
from weft.testing.members import MemoryControl, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

JOBS = count()
TINY = Tiny()
PATIENT = Deadlines(rendezvous=60, offer=60, begin=60, move=60, vote=60, commit=60)


@dataclass(eq=False)
class Stage:
    """A job on a hub of its own."""

    url: str
    job: str = field(default_factory=lambda: f"published{next(JOBS)}")
    hub: LocalHub = field(default_factory=LocalHub)
    policy: Policy = field(default_factory=Policy)

    def options(self, name: str) -> dict[str, Any]:
        return {
            "store": self.url, "job": self.job, "name": name, "transport": "local", "policy": self.policy,
            "transport_options": {"hub": self.hub}, "deadlines": PATIENT, "host": "here",
        }  # fmt: skip

    def publishers(self, stack: ExitStack, size: int = 2) -> tuple[list[MemorySource], list[Publisher]]:
        sources = [MemorySource(f"trainer/{rank}", TINY.source(rank, size)) for rank in range(size)]
        made = [
            Publisher(source=source, rank=rank, members=size, **self.options(source.name))
            for rank, source in enumerate(sources)
        ]
        together([publisher.open for publisher in made])
        stack.callback(lambda: together([publisher.close for publisher in made]))
        return sources, made

    def subscribers(self, stack: ExitStack, name: str, size: int = 1, **more: Any) -> list[Subscriber]:
        made = [
            Subscriber(
                target=MemoryTarget(f"{name}/{rank}", TINY.target(rank, size)), replica=name, rank=rank,
                replica_size=size, **{**self.options(f"{name}/{rank}"), **more},
            )
            for rank in range(size)
        ]  # fmt: skip
        together([subscriber.open for subscriber in made])
        stack.callback(lambda: together([subscriber.close for subscriber in made]))
        return made


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """All at once, each in a thread; raises what the first one raised."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(n: int) -> None:
        try:
            results[n] = calls[n]()
        except BaseException as error:  # noqa: BLE001  # raised by whoever waits
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a member does not end"
    if errors:
        raise errors[0]
    return results


def publish(sources: list[MemorySource], publishers: list[Publisher], version: int) -> None:
    """As a trainer of several ranks does; the weights change right after it."""
    for source in sources:
        source.load(TINY.tensors(version))
    together([lambda p=publisher: p.publish(version) for publisher in publishers])
    for source in sources:
        source.load(TINY.tensors(0))


def receive(subscribers: list[Subscriber]) -> Report:
    """One version, whole, at every member."""
    for subscriber in subscribers:
        subscriber._target.poison()
    reports: list[Report] = together([subscriber.receive for subscriber in subscribers])
    assert len({(report.version, report.digest) for report in reports}) == 1
    for rank, subscriber in enumerate(subscribers):
        wanted = TINY.expected(rank, len(subscribers), TINY.tensors(reports[0].version))
        assert not mismatches(subscriber._target.contents(), wanted)
    return reports[0]


@pytest.fixture
def stage(store_url: str) -> Stage:
    return Stage(store_url)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_replicas_read_in_their_own_time_while_the_weights_change(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 1)
    wide = stage.subscribers(stack, "wide", 2)
    assert receive(wide).version == 1
    for version in (2, 3, 4):
        publish(sources, publishers, version)
    narrow = stage.subscribers(stack, "narrow")  # comes late
    assert receive(narrow).version == 4
    assert receive(wide).version == 4  # what it did not ask for it never gets
    assert wide[0].holder == narrow[0].holder == "trainer"


def test_a_version_newer_than_ones_own_is_waited_for(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 1)
    replica = stage.subscribers(stack, "replica")
    assert receive(replica).version == 1
    with pytest.raises(DeadlineError, match=r"a version newer than 1.*trainer has 1"):
        replica[0].receive(Deadline.after(0.2))
    waiting = threading.Timer(0.2, lambda: publish(sources, publishers, 2))
    waiting.start()
    assert receive(replica).version == 2
    waiting.join(60)


def test_replicas_read_from_replicas_and_from_them_once_the_trainer_has_gone(stage: Stage, stack: ExitStack) -> None:
    with ExitStack() as trainer:
        sources, publishers = stage.publishers(trainer)
        publish(sources, publishers, 1)
        first = stage.subscribers(stack, "first", 2, relay=True)
        digest = receive(first).digest
        second = stage.subscribers(stack, "second", 2, relay=True)
        report = receive(second)
        assert (report.version, report.digest, second[0].holder) == (1, digest, "first")  # nearer than the trainer
    third = stage.subscribers(stack, "third", prefer=lambda holders: max(holders, key=lambda h: h.name))
    report = receive(third)
    assert (report.version, report.digest, third[0].holder) == (1, digest, "second")


def test_a_slow_reader_gets_its_version_whole_while_the_trainer_publishes_on(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 1)
    reached, go_on = threading.Event(), threading.Event()

    def wait(what: str, argument: object) -> None:
        if what == "begin":
            reached.set()
            assert go_on.wait(60)

    slow = stage.subscribers(stack, "slow")
    slow[0]._target._before = wait
    outcome: list[Report] = []
    reading = threading.Thread(target=lambda: outcome.append(receive(slow)), daemon=True)
    reading.start()
    assert reached.wait(60)
    for version in (2, 3):
        publish(sources, publishers, version)  # returns, since a copy is free
    assert publishers[0].version == 1
    quick = stage.subscribers(stack, "quick")
    later = threading.Timer(0.2, go_on.set)
    later.start()
    assert receive(quick).version == 3  # as soon as nobody reads version 1 any more
    reading.join(60)
    assert outcome[0].version == 1
    assert receive(slow).version == 3


def test_a_holder_that_leaves_in_the_middle_is_replaced_by_another(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 1)
    with ExitStack() as leaving:
        relay = stage.subscribers(leaving, "relay", relay=True)
        receive(relay)
        control = MemoryControl("reader")
        reader = stage.subscribers(stack, "reader", control=control)
        gone = threading.Event()

        def strike(what: str, argument: object) -> None:
            if what == "begin" and not gone.is_set():
                gone.set()
                leaving.close()

        reader[0]._target._before = strike
        report = receive(reader)
    assert gone.is_set()
    assert reader[0].holder == "trainer"
    assert (report.version, reader[0].version, control.served) == (1, 1, 1)


def test_a_trainer_that_restarts_goes_on_counting(stage: Stage, stack: ExitStack) -> None:
    replica = stage.subscribers(stack, "replica")
    with ExitStack() as life:
        sources, publishers = stage.publishers(life)
        publish(sources, publishers, 1)
        assert receive(replica).version == 1
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 2)
    assert receive(replica).version == 2


def test_ranks_that_are_apart_serve_only_what_all_have_published(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = stage.publishers(stack)
    early, late = stage.subscribers(stack, "early"), stage.subscribers(stack, "late")
    publish(sources, publishers, 1)
    Deadline.after(60).wait(lambda: publishers[0].version == 1, "version 1", list)
    for version in (2, 3):
        sources[0].load(TINY.tensors(version))
        publishers[0].publish(version)
    assert receive(early).version == 1
    for version in (2, 3):  # rank 0 has gone on, so version 2 is left out
        sources[1].load(TINY.tensors(version))
        publishers[1].publish(version)
    assert receive(late).version == 3


def test_what_rank_0_serves_is_taken_over_before_it_is_replaced(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 1)
    Deadline.after(60).wait(lambda: publishers[1].version == 1, "version 1", list)
    copies = publishers[1]._copies
    with copies.newest.reading(1) as there:
        assert there
        publish(sources, publishers, 2)
        Deadline.after(60).wait(lambda: publishers[0].version == 2, "version 2", list)
        for source in sources:
            source.load(TINY.tensors(3))
        publishers[0].publish(3)
        third = threading.Thread(target=publishers[1].publish, args=(3,), daemon=True)
        third.start()
        third.join(0.3)
        assert (copies.version, copies.coming) == (1, 2)
    third.join(60)
    assert receive(stage.subscribers(stack, "replica")).version == 3


@pytest.mark.parametrize("landing", ["shadow", "in_place"])
def test_every_version_that_replicas_read_is_whole_while_another_is_published_all_the_time(
    store_url: str, stack: ExitStack, landing: str
) -> None:
    stage = Stage(store_url, policy=Policy(landing=landing))
    sources, publishers = stage.publishers(stack)
    replicas = [stage.subscribers(stack, name, size, relay=True) for name, size in (("one", 1), ("two", 2))]
    versions = 12
    seen: dict[int, list[int]] = {0: [], 1: []}

    def train() -> None:
        for version in range(1, versions + 1):
            publish(sources, publishers, version)

    def serve(n: int) -> None:
        while not seen[n] or seen[n][-1] < versions:
            seen[n].append(receive(replicas[n]).version)

    together([train, lambda: serve(0), lambda: serve(1)])
    for versions_seen in seen.values():
        assert versions_seen == sorted(set(versions_seen))


def test_what_cannot_be_published_is_refused(stage: Stage) -> None:
    source = MemorySource("trainer/0", TINY.target(0, 1, scratch_slots=1))
    with pytest.raises(ConfigError, match=r"these do not: layer1.down \(scratch\)"):
        Publisher(source=source, rank=0, members=1, **stage.options("trainer/0")).open()
    with pytest.raises(ConfigError, match="rank is 2, expected 0 to 1"):
        Publisher(source=source, rank=2, members=2, **stage.options("trainer/0"))
    with pytest.raises(ConfigError, match="rank is 1, expected 0 to 0"):
        Subscriber(target=MemoryTarget("r", TINY.target(0, 1)), replica="r", rank=1, **stage.options("r"))


def test_a_holder_whose_layouts_do_not_fit_is_not_read_from(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 1)
    wider = Tiny(hidden=64)
    stranger = MemorySource("stranger/0", wider.source(0, 1))
    other = Publisher(source=stranger, rank=0, members=1, holder="stranger", **stage.options("stranger/0"))
    stack.enter_context(other)
    stranger.load(wider.tensors(2))
    other.publish(2)  # newer, but of another model
    replica = stage.subscribers(stack, "replica", 2)
    assert receive(replica).version == 1
    with pytest.raises(DeadlineError, match=r"stranger has 2, which does not fit: .*0\.down.* and \d+ more"):
        replica[0].receive(Deadline.after(2))


def test_a_copy_that_is_overwritten_is_never_served(stage: Stage, stack: ExitStack) -> None:
    """Version 2 is complete when rank 0 fails in the middle of publishing 3, which rank 1 goes on with."""
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 1)
    Deadline.after(60).wait(lambda: publishers[0].version == publishers[1].version == 1, "version 1", list)
    copies, started, go_on = publishers[1]._copies, threading.Event(), threading.Event()

    class Slow(dict[str, torch.Tensor]):
        def items(self) -> Any:
            for number, item in enumerate(list(super().items())):
                if number == 3:
                    started.set()
                    assert go_on.wait(60)
                yield item

    def fails(version: int) -> Any:
        raise RuntimeError("not settled")

    with publishers[0]._copies.newest.reading(1) as there:
        assert there
        publish(sources, publishers, 2)
        for source in sources:
            source.load(TINY.tensors(3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources[0], "hold", fails)
            with pytest.raises(RuntimeError, match="not settled"):
                publishers[0].publish(3)
        copies._next = Slow(copies._next)
        third = threading.Thread(target=publishers[1].publish, args=(3,), daemon=True)
        third.start()
        assert started.wait(60)
    replica = stage.subscribers(stack, "replica")
    reader = threading.Thread(target=receive, args=(replica,), daemon=True)
    reader.start()
    reader.join(60)
    assert replica[0].version == 1  # compared by `receive`
    go_on.set()
    third.join(60)
    publish(sources, publishers, 4)
    assert receive(replica).version == 4


def test_a_holder_that_copies_for_long_is_still_known_and_one_that_is_stuck_is_not(
    stage: Stage, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weft.publication.holders, "LEASE_SECONDS", 0.5)
    sources, publishers = stage.publishers(stack, 1)
    publish(sources, publishers, 1)
    Deadline.after(60).wait(lambda: publishers[0].version == 1, "version 1", list)
    records = JobStore(stack.enter_context(closing(open_store(stage.url, Deadline.after(60)))), stage.job)
    copies, started, go_on = publishers[0]._copies, threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        assert go_on.wait(60)
        type(copies).turn(copies)

    monkeypatch.setattr(copies, "turn", slow)
    publish(sources, publishers, 2)
    assert started.wait(60)
    time.sleep(2)  # four times what the store waits for
    Deadline.after(60).wait(lambda: [h.version for h in Directory(records).holders()] == [1], "a sign of life", list)
    publishers[0]._listing._heart._until = 0.0  # as if it had been at it for longer than `begin` and `move`
    Deadline.after(60).wait(lambda: not Directory(records).holders(), "the end of the lease", list)
    go_on.set()
    assert receive(stage.subscribers(stack, "replica")).version == 2


def test_members_of_a_replica_that_came_back_follow_choices_of_their_own_life(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = stage.publishers(stack)
    publish(sources, publishers, 1)
    with ExitStack() as life:
        assert receive(stage.subscribers(life, "wide", 2)).version == 1
    back, cells = stage.subscribers(stack, "wide", 2), list[list[Any]]()
    for version in (1, 2, 3):
        if version > 1:
            publish(sources, publishers, version)
        assert receive(back).version == version
        assert back[0]._number == back[1]._number
        cells.append([subscriber._member for subscriber in back])
    assert cells == cells[:1] * 3, "who has a cell stays in it"
