"""An orchestrator that has only the controls, and members that ask it through the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from typing import Any

import pytest

import weft.orchestration.orchestrator
import weft.orchestration.remote
from weft.authentication import Secret
from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError, PeerLostError
from weft.job_store import JobStore
from weft.orchestration import ControlError, Doing, Orchestrator, RemoteControl, ReplicaState, replica_states
from weft.orchestration.records import Keys, Presence, Request, What, presence_key
from weft.stores import CountedStore, open_store
from weft.testing.members import Log, MemoryControl

JOBS = count()
SECONDS = 60.0
OF_A_REQUEST = (4, 2)
"""Operations: a look at the orchestrator's lease, a number, the request and the wait for its answer; the orchestrator's
wait, and its answer.
"""


class Scene:
    """One job, whose members and orchestrators are threads of this process."""

    def __init__(self, url: str) -> None:
        self.url, self.job, self.log = url, f"orchestrated{next(JOBS)}", Log()
        self.stack = ExitStack()
        self.controls: dict[str, MemoryControl] = {}

    def control(self, replica: str, before: Callable[[str, object], None] | None = None) -> MemoryControl:
        self.controls[replica] = MemoryControl(replica, log=self.log, before=before)
        return self.controls[replica]

    def orchestrator(self, **options: Any) -> Orchestrator:
        made = Orchestrator(store=self.url, job=self.job, controls=self.controls, **options)
        return self.stack.enter_context(made)

    def remote(self, replica: str, **options: Any) -> RemoteControl:
        return self.stack.enter_context(RemoteControl(store=self.url, job=self.job, replica=replica, **options))

    def records(self, secret: Secret | None = None) -> JobStore:
        store: Store = self.stack.enter_context(closing(open_store(self.url, Deadline.after(SECONDS))))
        return JobStore(store, self.job, secret)

    def said(self, replica: str) -> list[tuple[str, object]]:
        return [(what, argument) for name, what, argument in self.log.entries() if name == replica]

    def states(self) -> dict[str, ReplicaState]:
        return replica_states(self.url, self.job, Deadline.after(SECONDS))


@pytest.fixture
def scene(store_url: str) -> Iterator[Scene]:
    made = Scene(store_url)
    with made.stack:
        yield made


def soon() -> Deadline:
    return Deadline.after(SECONDS)


def until(ready: Callable[[], bool], what: str) -> None:
    soon().wait(ready, what, list)


def test_what_a_member_asks_is_done_and_seen(scene: Scene) -> None:
    scene.control("a/b")
    orchestrator = scene.orchestrator()
    remote = scene.remote("a/b")
    remote.pause("wait", soon())
    assert scene.states() == {"a/b": ReplicaState(1, Doing.PAUSED)}
    remote.invalidate_caches(7)
    remote.resume(7)
    assert scene.said("a/b") == [("pause", "wait"), ("invalidate_caches", 7), ("resume", 7)]
    remote.pause("keep", soon())
    remote.resume(7)
    assert scene.said("a/b")[3:] == [("pause", "keep"), ("resume", 7)], "caches are as they were"
    remote.refuse("half of it")
    assert scene.controls["a/b"].refused == "half of it"
    assert scene.states() == orchestrator.states == {"a/b": ReplicaState(5, Doing.REFUSING, 7, "half of it")}
    assert str(orchestrator.states["a/b"]) == "refusing, version 7 last: half of it"


def test_a_slow_engine_holds_up_no_other(scene: Scene) -> None:
    go_on = threading.Event()
    scene.control("slow", lambda *_: assert_(go_on.wait(SECONDS)))
    scene.control("brisk")
    scene.orchestrator()
    slow = threading.Thread(target=scene.remote("slow").pause, args=("wait", soon()), daemon=True)
    slow.start()
    brisk = scene.remote("brisk")
    brisk.pause("wait", soon())
    brisk.resume(1)
    assert slow.is_alive()
    go_on.set()
    slow.join(SECONDS)
    assert [name for name, *_ in scene.log.entries()] == ["brisk", "brisk", "slow"]


def assert_(fact: bool) -> None:
    assert fact


@pytest.mark.trap(40)
def test_without_an_orchestrator_a_member_is_told_so_at_once_and_nothing_is_left_to_do(scene: Scene) -> None:
    remote = scene.remote("one")
    with pytest.raises(PeerLostError, match=r"lost the orchestrator of job 'orchestrated.*: it gives no sign of life"):
        remote.pause("wait", soon())
    scene.control("other")
    scene.orchestrator(name="node7")
    with pytest.raises(PeerLostError, match=r"lost orchestrator node7 .*no control of replica one, only of other"):
        remote.pause("wait", soon())
    assert scene.records().store.keys(f"weft/{scene.job}/orchestration/request/") == []


@pytest.mark.trap(47)
def test_what_fails_in_a_control_is_told_in_its_words(scene: Scene) -> None:
    def fails(what: str, argument: object) -> None:
        if what == "invalidate_caches":
            raise ValueError("blocks are in use")

    scene.control("one", fails)
    scene.orchestrator(name="node7")
    remote = scene.remote("one")
    remote.pause("wait", soon())
    remote.invalidate_caches(1)
    with pytest.raises(ControlError, match="orchestrator node7: resume of replica one: ValueError: blocks are in use"):
        remote.resume(1)
    assert scene.said("one") == [("pause", "wait")], "it does not serve what it could not forget"
    assert scene.states()["one"] == ReplicaState(2, Doing.UNKNOWN, None, error="ValueError: blocks are in use")


@pytest.mark.trap(40)
def test_a_pause_that_takes_too_long_names_the_orchestrator_and_leaves_the_replica_serving(scene: Scene) -> None:
    go_on = threading.Event()
    pauses = count()

    def second_is_slow(what: str, argument: object) -> None:
        if what == "pause" and next(pauses) == 1:
            assert go_on.wait(SECONDS)

    control = scene.control("one", second_is_slow)
    orchestrator = scene.orchestrator(name="node7")
    remote = scene.remote("one")
    remote.pause("wait", soon())
    remote.resume(3)
    with pytest.raises(DeadlineError, match=r"pause of replica one: not within 0.2 s; late: orchestrator node7"):
        remote.pause("wait", Deadline.after(0.2))
    go_on.set()
    until(lambda: orchestrator.states["one"].answered == 4, "the request to go on")
    assert control.served == 3
    remote.refuse("half of it")
    go_on.clear()
    remote.pause("wait", soon())
    orchestrator.close()
    with pytest.raises(PeerLostError):
        remote.pause("wait", soon())
    assert control.served is None, "who refused is not asked to go on"


@pytest.mark.trap(64)
def test_an_orchestrator_that_comes_back_does_what_is_open_and_nothing_else(scene: Scene) -> None:
    for replica in ("asked", "paused", "served"):
        scene.control(replica)
    first = scene.orchestrator()
    for replica in ("paused", "served"):
        scene.remote(replica).pause("wait", soon())
    scene.remote("served").resume(4)
    first.close()
    records = scene.records()
    dead = Presence("dead", b"dead", ("asked", "paused", "served"))
    records.lease("orchestrator", presence_key(records), dead, SECONDS)  # as of one that was killed
    member = threading.Thread(target=scene.remote("asked").pause, args=("wait", soon()), daemon=True)
    member.start()
    until(lambda: records.store.get(Keys.of(records, "asked").request) is not None, "the request")
    before = scene.log.entries()
    orchestrator = scene.orchestrator()
    member.join(SECONDS)
    assert not member.is_alive()
    assert scene.log.entries()[len(before) :] == [("asked", "pause", "wait")]
    assert {name: state.doing for name, state in orchestrator.states.items()} == {
        "asked": Doing.PAUSED, "paused": Doing.PAUSED, "served": Doing.SERVING,
    }  # fmt: skip


def test_a_refusal_waits_for_an_orchestrator(scene: Scene) -> None:
    with pytest.raises(PeerLostError):
        scene.remote("one").refuse("half of it")
    control = scene.control("one")
    scene.orchestrator()
    until(lambda: control.refused == "half of it", "the refusal")


@pytest.mark.trap(49)
def test_a_job_has_one_orchestrator(scene: Scene) -> None:
    scene.control("one")
    first = scene.orchestrator(name="first", lease_seconds=0.2)
    second = scene.orchestrator(name="second")
    with pytest.raises(ConfigError, match="orchestrator second has taken the place of first in job"):
        first.serve()
    scene.remote("one").pause("wait", soon())
    assert scene.said("one") == [("pause", "wait")]
    threading.Timer(0.1, second.close).start()
    second.serve()


def test_a_lost_lease_is_taken_again(scene: Scene) -> None:
    scene.control("one")
    scene.orchestrator(lease_seconds=0.2)
    records = scene.records()
    records.store.delete(presence_key(records))
    until(lambda: records.store.get(presence_key(records)) is not None, "another lease")


def test_replicas_may_come_later_and_their_controls_change(scene: Scene) -> None:
    with pytest.raises(ConfigError, match="the orchestrator is not open"):
        Orchestrator(store=scene.url, job=scene.job, controls={}).attend("one", scene.control("one"))
    scene.controls.clear()
    orchestrator = scene.orchestrator()
    first, second = scene.control("first life"), scene.control("second life")
    orchestrator.attend("one", first)
    remote = scene.remote("one")
    remote.pause("wait", soon())
    orchestrator.attend("one", second)
    remote.resume(2)
    assert (first.served, second.served) == (None, 2)


def test_of_two_controls_of_a_replica_the_one_that_was_overtaken_is_told(scene: Scene) -> None:
    scene.control("one")
    records = scene.records()
    records.lease("orchestrator", presence_key(records), Presence("dead", b"dead", ("one",)), SECONDS)
    raised: list[Exception] = []

    def ask() -> None:
        try:
            scene.remote("one").pause("wait", soon())
        except ControlError as error:
            raised.append(error)

    member = threading.Thread(target=ask, daemon=True)
    member.start()
    keys = Keys.of(records, "one")
    until(lambda: records.store.get(keys.request) is not None, "the request")
    records.put("request", keys.request, Request(records.store.add(keys.requests, 1), What.REFUSE, 1.0, reason="no"))
    scene.orchestrator()
    member.join(SECONDS)
    assert "pause of replica one: another control of it has asked for something else since" in str(raised[0])
    assert scene.said("one") == [("refuse", "no")]


def test_who_does_not_know_the_secret_asks_in_vain(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret("the secret of this job")
    scene.control("one")
    scene.orchestrator(secret=secret)
    stranger = scene.records(Secret("another job's secret"))
    keys = Keys.of(stranger, "one")
    stranger.put("request", keys.request, Request(stranger.store.add(keys.requests, 1), What.RESUME, 1.0, version=9))
    until(lambda: "who may not: " in caplog.text, "a warning")
    remote = scene.remote("one", secret=secret)
    remote.pause("wait", soon())
    assert scene.said("one") == [("pause", "wait")]


@pytest.mark.trap(75)
@pytest.mark.parametrize("replicas", [1, 5])
def test_a_warm_refit_costs_a_replica_the_same_few_operations(
    scene: Scene, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: dict[str, list[CountedStore]] = {"remote": [], "orchestrator": []}
    for name, module in (("remote", weft.orchestration.remote), ("orchestrator", weft.orchestration.orchestrator)):

        def opened(url: str, deadline: Deadline, name: str = name) -> CountedStore:
            stores[name].append(CountedStore(open_store(url, deadline)))
            return stores[name][-1]

        monkeypatch.setattr(module, "open_store", opened)
    names = [f"replica{n}" for n in range(replicas)]
    for name in names:
        scene.control(name)
    scene.orchestrator(lease_seconds=10 * SECONDS)
    remotes = [scene.remote(name) for name in names]

    def refit(version: int) -> None:
        for remote in remotes:
            remote.pause("wait", soon())
        for remote in remotes:
            remote.invalidate_caches(version)
            remote.resume(version)

    def counted() -> tuple[int, int]:
        asked, did = (sum(store.operations for store in stores[name]) for name in ("remote", "orchestrator"))
        return asked, did

    refit(1)
    until(lambda: counted()[1] == 1 + replicas * (2 + 2 * OF_A_REQUEST[1]), "the next wait of each replica")
    asked, did = counted()
    for version in (2, 3):
        refit(version)
    until(lambda: counted() == (asked + 4 * replicas * OF_A_REQUEST[0], did + 4 * replicas * OF_A_REQUEST[1]), "counts")
