"""Members meet over real stores, in threads and in processes, or each gets an error that says why not."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from weft.authentication import Secret
from weft.builder import LayoutBuilder
from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError, PeerLostError, RecordError, RendezvousError, WeftError
from weft.layout import Layout
from weft.member import Member, RemoteRegion
from weft.rendezvous import EndpointRecord, Rendezvous
from weft.roster import Expect
from weft.store_server import serve_store
from weft.stores import open_store

SECONDS = 30.0
SHORT_SECONDS = 0.4
TEAM = ("rollout0/0", "rollout0/1", "trainer/0", "trainer/1")


def make_layout(rows: int = 4) -> Layout:
    builder = LayoutBuilder()
    builder.tensor("w", (rows, 4), "float32")
    builder.buffer("w", "float32", rows * 4, group="g")
    builder.shard("w", "w")
    return builder.build()


def endpoint(name: str, incarnation: int, *, fingerprint: str = "plan", memory_epoch: int = 0) -> EndpointRecord:
    regions = (RemoteRegion(2**63, 64, "cpu"),)
    return EndpointRecord(
        name,
        incarnation,
        memory_epoch,
        b"address of " + name.encode(),
        regions,
        bytes(8),
        bytes(8),
        b"",
        b"",
        fingerprint,
    )


@dataclass
class Person:
    """One process's view of the rendezvous, played by a thread or a process."""

    store: Store
    name: str
    seconds: float = SECONDS
    job: str = "job"
    expect: Expect = field(default_factory=lambda: Expect(2, 1))
    policy: bytes = b"\x80"
    rows: int = 4
    secret: Secret | None = None

    def __post_init__(self) -> None:
        self.rendezvous = Rendezvous(self.store, self.job, self.expect, Deadline.after(self.seconds), self.secret)
        self.incarnation = self.rendezvous.incarnation(self.name)

    def announce(self) -> Person:
        layout = make_layout(self.rows)
        replica = self.name.partition("/")[0] if self.name.startswith("rollout") else None
        member = Member(
            self.name,
            None if replica else layout.address,
            layout.address if replica else None,
            replica,
            2 if replica else 0,
            "host",
            "host",
            "cpu",
            incarnation=self.incarnation,
        )
        self.rendezvous.announce(member, {layout.address: layout}, self.policy, weft_version="0.1.0")
        return self

    def names(self) -> list[tuple[str, int]]:
        return [(member.name, member.incarnation) for member in self.rendezvous.members()]

    def publish(self, fingerprint: str = "plan") -> None:
        self.rendezvous.publish_endpoint(endpoint(self.name, self.incarnation, fingerprint=fingerprint))

    def meet(self) -> list[tuple[str, int]]:
        """Both rounds, as `Refit` does them."""
        self.announce()
        names = self.names()
        self.publish()
        records = self.rendezvous.endpoints([name for name, _ in names])
        assert [(record.name, record.incarnation) for record in records.values()] == names
        return names


@pytest.fixture(params=["tcp", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    with serve_store() as server:
        yield server.url


@pytest.fixture
def open_one(url: str) -> Iterator[Callable[[], Store]]:
    with contextlib.ExitStack() as stack:

        def open_another() -> Store:
            store = open_store(url, Deadline.after(SECONDS))
            stack.callback(store.close)
            return store

        yield open_another


def together(*calls: Callable[[], object]) -> list[object]:
    """Results or weft's errors of calls that run at the same time."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        barrier.wait(SECONDS)
        try:
            return call()
        except WeftError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.trap(18)
def test_all_members_meet_and_meet_again_with_new_incarnations(open_one: Callable[[], Store]) -> None:
    stores = [open_one() for _ in TEAM]
    for life in (1, 2, 3):
        people = [Person(store, name) for store, name in zip(stores, TEAM, strict=True)]
        assert together(*(person.meet for person in people)) == [[(name, life) for name in TEAM]] * 4
        if life == 2:
            for person in people:
                person.rendezvous.leave()


def test_members_of_two_jobs_in_one_store_do_not_meet(open_one: Callable[[], Store]) -> None:
    people = [
        Person(open_one(), "trainer/0", job=job, expect=Expect(1, 1), seconds=SHORT_SECONDS) for job in ("a", "a/b")
    ]
    errors = together(*(person.meet for person in people))
    assert all(isinstance(error, RendezvousError) and "1 of 1 sources (trainer/0)" in str(error) for error in errors)


def test_layouts_are_published_once_and_verified(open_one: Callable[[], Store]) -> None:
    store = open_one()
    people = [Person(store, name, rows=8 if name.startswith("rollout") else 4).announce() for name in TEAM]
    members = people[0].rendezvous.members()
    layouts = {people[1].rendezvous.layout(member.source_layout or member.target_layout or "") for member in members}
    assert layouts == {make_layout(4), make_layout(8)}
    kept = [key for key in store.keys("weft/job/layout/") if key.endswith("/bytes")]
    assert len(kept) == 2
    store.set(kept[0], b"damage")
    with pytest.raises(RecordError, match="SHA-256"):
        people[0].rendezvous.layout(kept[0].split("/")[-2])


@pytest.mark.trap(40, 45)
def test_a_missing_member_is_an_error_on_every_member_that_says_who_is_there(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name) for name in ("rollout0/0", "rollout0/1")]
    people.append(Person(open_one(), "trainer/1", seconds=SHORT_SECONDS))  # whose giving up ends the others' wait, too
    for error in together(*(person.meet for person in people)):
        assert isinstance(error, RendezvousError)
        assert "not everybody came within 0.4 s: found 1 of 2 sources (trainer/1), 1 of 1 replicas" in str(error)


def test_too_many_members_are_an_error_on_every_member(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in ("trainer/0", "trainer/1", "trainer/2", "rollout0/0")]
    for error in together(*(person.names for person in people)):
        assert isinstance(error, RendezvousError)
        assert "too many sources: expected 2, found 3 (trainer/0, trainer/1, trainer/2)" in str(error)


def test_one_too_many_at_the_same_moment_leaves_all_others_with_the_same_members(open_one: Callable[[], Store]) -> None:
    names = [*TEAM, "rollout1/0"]
    results = together(*(Person(open_one(), name).meet for name in names))
    refused = [str(result) for result in results if isinstance(result, RendezvousError)]
    met = [result for result in results if not isinstance(result, RendezvousError)]
    if met:  # the team was complete before the fifth came
        assert len(refused) == 1
        assert "too many members" in refused[0]
        assert met == [[(name, 1) for name in TEAM]] * 4
    else:
        assert all("too many replicas: expected 1, found 2 (rollout0, rollout1)" in reason for reason in refused)


@pytest.mark.trap(45)
def test_different_policies_are_an_error_on_every_member_that_gives_both(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name) for name in TEAM]
    people[0].policy = b"\x81\xa4bits\x08"
    for error in together(*(person.meet for person in people)):
        assert isinstance(error, RendezvousError)
        assert "policies differ: {'bits': 8} at rollout0/0; {} at" in str(error)


@pytest.mark.trap(49, 64)
def test_of_two_processes_with_one_name_the_newer_meets_and_the_older_is_told(open_one: Callable[[], Store]) -> None:
    older = Person(open_one(), "trainer/0").announce()
    newer = Person(open_one(), "trainer/0").announce()
    others = [Person(open_one(), name) for name in TEAM if name != "trainer/0"]
    newer.publish()
    error, *results = together(older.names, newer.names, *(person.meet for person in others))
    assert isinstance(error, RendezvousError)
    assert "another process joined as 'trainer/0' (incarnation 2; this one is 1)" in str(error)
    assert results == [[(name, 2 if name == "trainer/0" else 1) for name in TEAM]] * 4


@pytest.mark.trap(47)
def test_a_failure_ends_every_wait_with_its_reason_and_reaches_who_comes_late(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name) for name in TEAM]
    *waiting, broken, late = people
    results = together(
        *(person.meet for person in waiting), lambda: broken.rendezvous.fail(broken.name, "out of memory")
    )
    for error in [*results[:-1], *together(late.meet)]:
        assert isinstance(error, RendezvousError)
        assert "trainer/0: out of memory" in str(error)
    again = [Person(person.store, person.name) for person in people]
    assert together(*(person.meet for person in again)) == [[(name, 2) for name in TEAM]] * 4


@pytest.mark.trap(47)
def test_a_failure_between_the_rounds_ends_the_second_with_all_reasons(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    assert [person.names() for person in people] == [[(name, 1) for name in TEAM]] * 4
    people[0].rendezvous.fail(TEAM[0], "no plan is possible")
    people[1].rendezvous.fail(TEAM[1], "no memory")
    for person in people[2:]:
        person.publish()
        with pytest.raises(RendezvousError, match=r"rollout0/0: no plan is possible\n.*rollout0/1: no memory"):
            person.rendezvous.endpoints(TEAM)


@pytest.mark.trap(40, 45)
def test_a_member_that_never_publishes_its_endpoint_is_named_on_every_member(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    together(*(person.names for person in people))
    for person in people[1:]:
        person.publish()
        person.rendezvous._deadline = Deadline.after(SHORT_SECONDS)  # only now: the first round may take long
    errors = together(*(lambda person=person: person.rendezvous.endpoints(TEAM) for person in people[1:]))
    assert any(isinstance(error, DeadlineError) and error.late == ("rollout0/0",) for error in errors)
    assert all(
        isinstance(error, DeadlineError | RendezvousError) and "late: rollout0/0" in str(error) for error in errors
    )


@pytest.mark.trap(28)
def test_an_error_of_a_wait_without_its_event_keeps_nothing_once_it_is_gone(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    rendezvous = people[0].rendezvous
    assert rendezvous.members()
    rendezvous._deadline = Deadline.after(SHORT_SECONDS)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(DeadlineError):
            rendezvous.endpoints(TEAM)
            raise AssertionError("nobody has published an endpoint")
        kept = weakref.ref(rendezvous)
        del people, rendezvous
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.trap(18, 64)
def test_a_member_that_restarts_between_the_rounds_ends_them_and_its_old_endpoint_is_not_used(
    open_one: Callable[[], Store],
) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    together(*(person.names for person in people))
    for person in people[1:]:
        person.publish()
    restarted = Person(open_one(), TEAM[0]).announce()
    for person in people[1:]:
        with pytest.raises(RendezvousError, match="rollout0/0 came back as incarnation 2"):
            person.rendezvous.endpoints(TEAM)
    again = [Person(person.store, person.name) for person in people[1:]]
    restarted.publish()
    results = together(restarted.names, *(person.meet for person in again))
    assert results == [[(name, 2) for name in TEAM]] * 4
    assert [record.incarnation for record in restarted.rendezvous.endpoints(TEAM).values()] == [2] * 4


def test_a_member_that_leaves_between_the_rounds_is_named(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    together(*(person.names for person in people))
    people[0].rendezvous.leave()
    with pytest.raises(RendezvousError, match="rollout0/0 left before saying how to be reached"):
        people[1].rendezvous.endpoints(TEAM)


@pytest.mark.trap(18)
@pytest.mark.trap(40, 45, 48)
def test_nobody_begins_before_all_are_ready(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    together(*(person.names for person in people))
    for person in people:
        person.rendezvous._deadline = Deadline.after(SHORT_SECONDS)
    looks = [0] * 4
    errors = together(*(lambda n=n: people[n].rendezvous.ready(lambda: looks.__setitem__(n, 1)) for n in range(1, 4)))
    assert any(isinstance(error, DeadlineError) and error.late == ("rollout0/0",) for error in errors)
    assert all(
        isinstance(error, DeadlineError | RendezvousError) and "late: rollout0/0" in str(error) for error in errors
    )
    assert looks == [0, 1, 1, 1]
    again = [Person(open_one(), name).announce() for name in TEAM]
    together(*(person.names for person in again))
    assert together(*(lambda person=person: person.rendezvous.ready(lambda: None) for person in again)) == [None] * 4


@pytest.mark.trap(48)
def test_who_fails_to_connect_fails_all_with_its_reason(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    together(*(person.names for person in people))

    def lose() -> None:
        raise PeerLostError("trainer/1", "connection refused")

    def join(person: Person) -> None:
        try:
            person.rendezvous.ready(lose if person is people[0] else lambda: None)
        except PeerLostError as error:
            person.rendezvous.fail(person.name, str(error))
            raise

    errors = together(*(lambda person=person: join(person) for person in people[:3]))
    assert all("lost trainer/1: connection refused" in str(error) for error in errors)
    assert {type(error) for error in errors[1:]} == {RendezvousError}


def test_members_that_made_different_plans_are_an_error_that_names_them(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    together(*(person.names for person in people))
    for person in people:
        person.publish("other" if person.name == "trainer/1" else "plan")
    with pytest.raises(RendezvousError, match="plans differ: plan at rollout0/0; other at trainer/1"):
        people[0].rendezvous.endpoints(TEAM)


def test_an_endpoint_is_replaced_when_the_memory_epoch_changes(open_one: Callable[[], Store]) -> None:
    people = [Person(open_one(), name).announce() for name in TEAM]
    together(*(person.names for person in people))
    people[0].publish()
    fresh = endpoint(TEAM[0], 1, memory_epoch=1)
    people[0].rendezvous.publish_endpoint(fresh)
    assert people[1].rendezvous.endpoints([TEAM[0]]) == {TEAM[0]: fresh}


def test_garbage_in_the_store_is_a_record_error_that_names_the_key(open_one: Callable[[], Store]) -> None:
    store = open_one()
    person = Person(store, "trainer/0").announce()
    store.set(f"weft/job/log/{store.add('weft/job/entries', 1)}", b"garbage")
    with pytest.raises(RecordError, match=r"weft/job/log/2 of job 'job': .*garbage"):
        person.names()
    people = [Person(open_one(), name, job="other").announce() for name in TEAM]
    people[0].names()
    store.set("weft/other/endpoint/trainer/0/1", b"garbage")
    with pytest.raises(RecordError, match="garbage"):
        people[0].rendezvous.endpoints(["trainer/0"])


def test_an_entry_that_was_never_written_ends_in_an_error_that_names_it(open_one: Callable[[], Store]) -> None:
    person = Person(open_one(), "trainer/0", seconds=SHORT_SECONDS)
    person.store.add("weft/job/entries", 1)
    with pytest.raises(RendezvousError, match="entry 1 of the log is missing"):
        person.announce().names()


def test_what_cannot_take_part_is_refused_before_anybody_hears_of_it(open_one: Callable[[], Store]) -> None:
    store = open_one()
    with pytest.raises(ConfigError, match="job"):
        Person(store, "trainer/0", job="")
    with pytest.raises(ConfigError, match="name of a member"):
        Person(store, "")
    rendezvous = Person(store, "trainer/0").rendezvous
    idle = Member("trainer/0", None, None, None, 0, "h", "h", "cpu", incarnation=1)
    with pytest.raises(ConfigError, match="neither a source layout nor a target layout"):
        rendezvous.announce(idle, {}, b"")
    target = Member("trainer/9", None, "address", "", 0, "h", "h", "cpu", incarnation=2)
    with pytest.raises(
        ConfigError, match=r"took the name 'trainer/0'.*replica and its size.*layout address is not among"
    ):
        rendezvous.announce(target, {}, b"")
    with pytest.raises(ConfigError, match="endpoint of trainer/1#1"):
        rendezvous.publish_endpoint(endpoint("trainer/1", 1))
    assert store.keys("weft/job/log/") == []


def play(url: str, name: str, channel: Connection) -> None:
    """A member in a process of its own: tells its members, waits for a word, and goes through the second round."""
    person = Person(open_store(url, Deadline.after(SECONDS)), name, expect=Expect(2, 1), seconds=SECONDS)
    layout = make_layout()
    address = layout.address
    source = name.startswith("trainer")
    member = Member(
        name,
        address if source else None,
        None if source else address,
        None if source else "rollout0",
        0 if source else 1,
        "host",
        "host",
        "cpu",
        incarnation=person.incarnation,
    )
    person.rendezvous.announce(member, {address: layout}, b"\x80")
    channel.send(person.names())
    if channel.poll(SECONDS):
        channel.recv()
    person.publish()
    person.rendezvous._deadline = Deadline.after(1.0)  # only now: the first round may take long
    try:
        person.rendezvous.endpoints([other.name for other in person.rendezvous.members()])
    except WeftError as error:
        channel.send(f"{type(error).__name__}: {error}")


@pytest.mark.trap(40, 45)
def test_processes_meet_and_each_survivor_names_the_one_that_is_killed_before_the_second_round(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    names = ["rollout0/0", "trainer/0", "trainer/1"]
    with serve_store() as server, contextlib.ExitStack() as stack:
        channels, processes = [], []
        for name in names:
            mine, theirs = context.Pipe()
            process = context.Process(target=play, args=(server.url, name, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, SECONDS)
            stack.callback(process.kill)
            channels.append(mine)
            processes.append(process)
        for channel in channels:
            assert channel.poll(2 * SECONDS)
            assert channel.recv() == [(name, 1) for name in names]
        processes[1].kill()
        processes[1].join(SECONDS)
        for channel in (channels[0], channels[2]):
            channel.send("go on")
        for channel in (channels[0], channels[2]):
            assert channel.poll(SECONDS)
            assert "not within 1.0 s; late: trainer/0" in channel.recv()
