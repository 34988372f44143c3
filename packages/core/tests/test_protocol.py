"""The protocol's machines in every order of events, and broken ones, to see that the exploration finds them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weft.protocol import replica, sources, target
from weft.protocol.events import Actions, Event, Tell
from weft.testing.explorer import explore
from weft.testing.worlds import Job
from weft.wire import Notice

JOBS = {
    "in place": Job(),
    "shadow": Job(shadow=True),
    "two sources": Job(sources=("trainer/0", "trainer/1")),
    "three members": Job(replicas=(("first", "second", "third"),), shadow=True, faults=0),
    "two replicas": Job(replicas=(("first",), ("second",)), faults=0),
    "a chain": Job(replicas=(("first",), ("second",)), chained=True),
    "a chain of three": Job(replicas=(("first",), ("second",), ("third",)), chained=True, faults=0),
    "a chain beside": Job(replicas=(("first",), ("second",)), chained=True, shadow=True, faults=0),
}


@pytest.mark.trap(43, 44, 45, 46, 48, 50, 68)
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_no_order_of_events_breaks_a_promise(job: Job) -> None:
    found = explore(job)
    assert not found.broken
    outcomes = {outcome for end in found.ends for outcome in end}
    assert outcomes == ({"committed", "aborted", "lost"} if job.faults else {"committed"})


def after_the_first(kind: str, then: str) -> object:
    """A leader that counts to one: after the first report of a kind it tells what it should tell after the last."""

    def count(state: replica.Replica, event: Event) -> tuple[replica.Replica, Actions]:
        state, actions = counted(state, event)
        if event.kind != kind or len([report for report, _ in state.reached if report == kind]) != 1:
            return state, actions
        if then == "replica-begun":
            return state, (Tell(state.source_leader, Notice(then, state.name)),)
        told = tuple(Tell(member, Notice(then, state.name, numbers=(0, 0))) for member in state.members)
        return replace(state, decided=then == "commit"), told

    counted = replica._count
    return count


@pytest.mark.trap(43, 44, 45)
@pytest.mark.parametrize(
    ("kind", "then", "shadow"),
    [
        ("begun", "replica-begun", False),
        ("verified", "prepare", False),
        ("prepared", "commit", True),
        ("paused", "prepare", True),
    ],
    ids=[
        "bytes before all have begun",
        "prepared before all have voted",
        "committed before all",
        "installed before all have paused",
    ],
)
def test_a_leader_that_does_not_wait_for_all_is_found(
    kind: str, then: str, shadow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "_count", after_the_first(kind, then))
    assert explore(Job(shadow=shadow), 1).broken


def test_a_leader_that_tells_nobody_how_it_ended_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    end = replica._end

    def silent(state: replica.Replica, *, committed: bool) -> tuple[replica.Replica, Actions]:
        state, actions = end(state, committed=committed)
        return state, tuple(action for action in actions if not isinstance(action, Tell) or action.to in state.members)

    monkeypatch.setattr(replica, "_end", silent)
    assert "nothing has failed" in explore(Job(faults=0), 1).broken[0][0]


def test_who_is_behind_a_replica_that_does_not_begin_is_withdrawn_at_once() -> None:
    first = sources.Receiving("first", "first/0")
    second = sources.Receiving("second", "second/0", relays=("first/0",), after=frozenset({"first"}))
    state = sources.Sources(("trainer",), (first, second), frozenset({"trainer"}))
    state, actions = sources.step(state, Event("replica-outcome", "first/0", "first", "no room", (0,)))
    assert [known.stage for known in state.replicas] == [sources.Stage.ENDED, sources.Stage.WITHDRAWN]
    told = {(each.to, each.notice.kind): each.notice.text for each in actions if isinstance(each, Tell)}
    assert told["second/0", "withdraw"] == "replica first, which passes it on, has not begun: no room"
    assert ("first/0", "outcome") in told  # nobody begins to take from it any more
    _, actions = sources.step(state, Event("replica-outcome", "first/0", "first", "no room", (0,)))
    assert not actions


@pytest.mark.parametrize(("early", "words"), [(True, "serves old weights"), (False, "nothing has failed")])
def test_relays_that_are_told_too_early_or_never_are_found(
    early: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, offer = sources._begun, sources._offer

    def silent(state: sources.Sources, known: sources.Receiving) -> sources.Change:
        return begun(state, replace(known, relays=()))

    def hasty(state: sources.Sources) -> Actions:
        told = (Tell(relay, Notice("go", known.replica)) for known in state.replicas for relay in known.relays)
        return (*offer(state), *told)

    monkeypatch.setattr(sources, "_begun", silent)
    if early:
        monkeypatch.setattr(sources, "_offer", hasty)
    assert words in explore(replace(JOBS["a chain"], faults=0), 1).broken[0][0]


@pytest.mark.trap(48)
@pytest.mark.parametrize("shadow", [False, True], ids=["in place", "shadow"])
def test_a_member_that_forgets_that_it_was_touched_is_found(shadow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reach = target._reach
    monkeypatch.setattr(target, "_reach", lambda state, stage: replace(reach(state, stage), touched=False))
    fault, way = explore(Job(shadow=shadow), 1).broken[0]
    assert "serves old weights, but members hold" in fault
    assert way[0] == "trainer holds its weights"
