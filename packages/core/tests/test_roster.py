"""The conclusions that a log of events leads to, whoever reads it."""

from __future__ import annotations

import sys
from itertools import count

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import weft.roster
from weft.errors import ConfigError
from weft.member import Member
from weft.roster import Action, Event, Expect, MemberRecord, Roster

TEAM = ("rollout0/0", "rollout0/1", "trainer/0", "trainer/1")


def record(name: str, incarnation: int = 1, **changes: object) -> MemberRecord:
    replica = name.partition("/")[0] if name.startswith("rollout") else None
    member = Member(
        name,
        None if replica else "layout",
        "layout" if replica else None,
        replica,
        2 if replica else 0,
        "host",
        "host",
        "cpu",
        incarnation=incarnation,
    )
    fields = {field: value for field, value in changes.items() if field in Member.__struct_fields__}
    changes = {field: value for field, value in changes.items() if field not in fields}
    return msgspec.structs.replace(
        MemberRecord(msgspec.structs.replace(member, **fields), b"\x80", "0.1.0", 1, 2, 1), **changes
    )


def join(name: str, incarnation: int = 1, **changes: object) -> Event:
    return Event(Action.JOIN, name, incarnation, record=record(name, incarnation, **changes))


def roster(*events: Event) -> Roster:
    result = Roster()
    for event in events:
        result.apply(event)
    return result


def outcome(result: Roster, name: str, incarnation: int = 1) -> str | list[tuple[str, int]]:
    """Members of the attempt that a process is in, or its error, or why it still waits."""
    if result.newest[name] > incarnation:
        return "replaced"
    if reason := result.refused.get((name, incarnation)):
        return reason
    attempt = result.attempt(name, incarnation)
    assert attempt is not None
    if attempt.reasons:
        return attempt.failure()
    if not attempt.complete:
        return attempt.shortfall(Expect(2, 1))
    return [(member.name, member.incarnation) for member in attempt.members()]


COMPLETE = [join(name) for name in TEAM]


@given(st.permutations(TEAM))
def test_members_are_the_same_in_whatever_order_they_came(names: list[str]) -> None:
    result = roster(*map(join, names))
    assert [outcome(result, name) for name in TEAM] == [[(name, 1) for name in TEAM]] * 4


def test_a_member_that_is_source_and_target_counts_on_both_sides() -> None:
    both = [
        join(name, source_layout="a", target_layout="b", replica="r", replica_size=2, sources=2) for name in ("x", "y")
    ]
    assert outcome(roster(*both), "x") == [("x", 1), ("y", 1)]


def test_a_shortfall_names_who_is_there_and_what_is_missing() -> None:
    result = roster(join("trainer/1"), join("rollout0/1"))
    assert outcome(result, "trainer/1") == (
        "found 1 of 2 sources (trainer/1), 1 of 1 replicas (rollout0), replica rollout0 has 1 of 2 members (rollout0/1)"
    )
    assert outcome(roster(join("trainer/0"), join("trainer/1")), "trainer/0") == (
        "found 2 of 2 sources (trainer/0, trainer/1), 0 of 1 replicas"
    )


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        (
            [join(f"trainer/{n}") for n in range(3)],
            "too many sources: expected 2, found 3 (trainer/0, trainer/1, trainer/2)",
        ),
        ([join("rollout0/0"), join("rollout1/0")], "too many replicas: expected 1, found 2 (rollout0, rollout1)"),
        (
            [join(f"rollout0/{n}", replicas=2) for n in range(3)],
            "replica rollout0: expected 2 members, found 3 (rollout0/0, rollout0/1, rollout0/2)",
        ),
        (
            [join("rollout0/0"), join("rollout0/1", replica_size=4)],
            "sizes of replica rollout0 differ: 2 at rollout0/0; 4 at rollout0/1",
        ),
        (
            [join("trainer/0"), join("trainer/1", policy=b"\x81\xa1a\x01")],
            "policies differ: {'a': 1} at trainer/1; {} at trainer/0",
        ),
        ([join("trainer/0"), join("trainer/1", policy=b"\xc1")], "policies differ: c1 at trainer/1; {} at trainer/0"),
        (
            [join("trainer/0"), join("trainer/1", planner_version=2)],
            "planner versions differ: 1 at trainer/0; 2 at trainer/1",
        ),
        (
            [join("trainer/0"), join("trainer/1", weft_version="0.2.0")],
            "weft versions differ: 0.1.0 at trainer/0; 0.2.0 at trainer/1",
        ),
        (
            [join("trainer/0"), join("trainer/1", sources=4)],
            "expectations differ: 2 sources and 1 replicas at trainer/0; 4 sources and 1 replicas at trainer/1",
        ),
    ],
)
def test_a_contradiction_is_told_to_everybody_who_is_there_and_who_comes_later(events: list[Event], fault: str) -> None:
    result = roster(*events, join("late/0"))
    for name in [event.name for event in events] + ["late/0"]:
        assert fault in outcome(result, name)


def test_all_contradictions_are_told_at_once() -> None:
    result = roster(join("trainer/0"), join("trainer/1", weft_version="0.2.0", planner_version=2, policy=b"\x01"))
    failure = outcome(result, "trainer/0")
    assert all(word in failure for word in ("weft versions", "planner versions", "policies"))


def test_one_too_many_after_completion_is_refused_and_disturbs_nobody() -> None:
    result = roster(*COMPLETE, join("trainer/2"))
    assert "too many members" in outcome(result, "trainer/2")
    assert outcome(result, "trainer/0") == [(name, 1) for name in TEAM]
    again = roster(*COMPLETE, join("trainer/2"), join("trainer/2", 2))
    assert "too many members" in outcome(again, "trainer/2", 2)
    assert outcome(again, "trainer/0") == [(name, 1) for name in TEAM]


def test_a_restart_before_completion_takes_its_old_place() -> None:
    result = roster(join("trainer/0"), join("trainer/1"), join("trainer/0", 2), join("rollout0/0"), join("rollout0/1"))
    assert outcome(result, "trainer/0", 1) == "replaced"
    assert outcome(result, "trainer/0", 2) == [("rollout0/0", 1), ("rollout0/1", 1), ("trainer/0", 2), ("trainer/1", 1)]


def test_of_two_processes_with_one_name_the_newer_takes_part_even_when_the_older_comes_last() -> None:
    result = roster(
        join("trainer/0", 2), join("trainer/0", 1), join("trainer/1"), join("rollout0/0"), join("rollout0/1")
    )
    assert outcome(result, "trainer/0", 1) == "replaced"
    assert ("trainer/0", 2) in outcome(result, "trainer/1")


def test_a_shortfall_after_a_replacement_says_that_there_may_be_two_of_one_name() -> None:
    result = roster(join("trainer/0"), join("trainer/0", 2))
    assert "two processes of one name" in outcome(result, "trainer/0", 2)


@pytest.mark.trap(18)
def test_a_restart_after_completion_ends_it_and_all_members_come_together_anew() -> None:
    result = roster(*COMPLETE, join("trainer/0", 2))
    assert "trainer/0 came back as incarnation 2" in outcome(result, "trainer/1")
    assert "found 1 of 2 sources" in outcome(result, "trainer/0", 2)
    for name in TEAM:
        if name != "trainer/0":
            result.apply(join(name, 2))
    assert outcome(result, "trainer/0", 2) == [(name, 2) for name in TEAM]


@pytest.mark.trap(18)
def test_old_members_are_not_taken_for_new_ones_when_all_come_again() -> None:
    result = roster(*COMPLETE, join("trainer/0", 2), join("trainer/1", 2), join("rollout0/0", 2))
    assert "replica rollout0 has 1 of 2 members (rollout0/0)" in outcome(result, "trainer/0", 2)


@pytest.mark.trap(18)
def test_a_job_may_grow_by_members_that_expect_more() -> None:
    grown = [join(name, 2, replicas=2) for name in TEAM]
    added = [join(f"rollout1/{n}", replicas=2) for n in range(2)]
    for events in ([*added, *grown], [*grown, *added]):
        result = roster(*COMPLETE, *events)
        assert len(outcome(result, "rollout1/0")) == 6


def test_members_of_other_names_may_take_the_place_of_one_that_left() -> None:
    result = roster(*COMPLETE, Event(Action.LEAVE, "trainer/1", 1), join("trainer/9"))
    assert "found 1 of 2 sources (trainer/9)" in outcome(result, "trainer/9")


def test_who_leaves_before_completion_is_not_counted() -> None:
    result = roster(join("trainer/0"), Event(Action.LEAVE, "trainer/0", 1), *COMPLETE[:2], join("trainer/1"))
    assert "found 1 of 2 sources (trainer/1)" in outcome(result, "trainer/1")
    result.apply(join("trainer/0", 2))
    assert ("trainer/0", 2) in outcome(result, "trainer/1")


@pytest.mark.trap(45)
def test_a_failure_reaches_everybody_with_all_reasons_until_its_members_restart() -> None:
    result = roster(
        join("trainer/0"),
        Event(Action.FAIL, "trainer/1", 1, "out of memory"),
        Event(Action.FAIL, "rollout0/0", 1, "no such device"),
        join("rollout0/1"),
    )
    for name in ("trainer/0", "rollout0/1"):
        assert outcome(result, name) == "  trainer/1: out of memory\n  rollout0/0: no such device"
    for name in TEAM:
        result.apply(join(name, 2))
    assert outcome(result, "trainer/0", 2) == [(name, 2) for name in TEAM]


def test_equal_reasons_are_told_once() -> None:
    failures = [Event(Action.FAIL, name, 1, "no plan is possible") for name in ("trainer/0", "trainer/1")]
    assert outcome(roster(*COMPLETE, *failures), "rollout0/0") == "  trainer/0, trainer/1: no plan is possible"


def test_a_failure_of_an_old_process_is_ignored() -> None:
    result = roster(join("trainer/0", 2), Event(Action.FAIL, "trainer/0", 1, "old"))
    assert "found 1 of 2 sources" in outcome(result, "trainer/0", 2)


def test_who_gives_up_after_completion_has_not_given_up() -> None:
    late = Event(Action.LATE, "trainer/0", 1, "not everybody came")
    assert outcome(roster(*COMPLETE, late), "trainer/0") == [(name, 1) for name in TEAM]
    assert "not everybody came" in outcome(roster(*COMPLETE[:3], late, COMPLETE[3]), COMPLETE[3].name)


@given(st.lists(st.tuples(st.sampled_from(TEAM), st.sampled_from(list(Action))), max_size=30))
def test_after_any_history_members_that_try_again_come_together(history: list[tuple[str, Action]]) -> None:
    newest = dict.fromkeys(TEAM, 1)
    result = roster()

    def come(name: str) -> None:
        newest[name] += 1
        result.apply(join(name, newest[name]))

    for name, action in history:
        if action is Action.JOIN:
            come(name)
        else:
            result.apply(Event(action, name, newest[name], "why"))
    for name in TEAM:
        come(name)
    for _ in range(2):
        for name in TEAM:
            found = outcome(result, name, newest[name])
            if "why" in found or "came back" in found:  # an error; whoever waits keeps waiting
                come(name)
    assert [outcome(result, name, newest[name]) for name in TEAM] == [sorted(newest.items())] * 4


@pytest.mark.parametrize(("sources", "replicas"), [(0, 1), (1, 0), (-1, 1)])
def test_expecting_nobody_is_refused(sources: int, replicas: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 source and 1 replica"):
        Expect(sources, replicas)


HISTORY = st.lists(
    st.tuples(
        st.sampled_from([*TEAM, "rollout1/0", "trainer/2"]),
        st.sampled_from([Action.JOIN] * 4 + list(Action)),
        st.sampled_from(
            [{}] * 9 + [{"replica_size": 1}, {"sources": 1}, {"policy": b"\x81\xa1a\x01"}, {"replicas": 2}]
        ),
        st.booleans(),
    ),
    max_size=30,
)


@given(HISTORY)
def test_what_is_tallied_is_what_looking_at_all_members_finds(
    history: list[tuple[str, Action, dict[str, object], bool]],
) -> None:
    result, newest = roster(), dict.fromkeys([*TEAM, "rollout1/0", "trainer/2"], 1)
    for name, action, changes, restarts in history:
        newest[name] += restarts
        event = join(name, newest[name], **changes) if action is Action.JOIN else Event(action, name, newest[name], "w")
        attempt = result._current
        came_before = attempt.complete or bool(attempt.reasons)
        result.apply(event)
        attempt = result._current
        faults = weft.roster._contradictions(attempt.records)
        assert attempt.tally.contradicts == bool(faults)
        assert attempt.tally.whole == (not faults and bool(attempt.records) and whole(attempt.records))
        if not came_before and action is Action.JOIN:
            assert attempt.complete == attempt.tally.whole
            assert [fault for name, fault in attempt.reasons if not name] == faults


def whole(records: dict[str, MemberRecord]) -> bool:
    """Whether those that are there, who agree, are all that are expected."""
    record = next(iter(records.values()))
    sources, replicas = weft.roster._sides(records)
    sizes = {replica: records[names[0]].member.replica_size for replica, names in replicas.items()}
    found = len(sources), len(replicas)
    return found == (record.sources, record.replicas) and sizes == {r: len(names) for r, names in replicas.items()}


def test_an_entry_costs_the_same_however_many_there_are() -> None:
    def calls(members: int) -> int:
        """Python's calls, into its own libraries too, while the last of so many members joins."""
        names = [f"trainer/{n}" for n in range(members)]
        events = [join(name, sources=members + 1, replicas=1) for name in names]
        result, counted = roster(*events[:-1]), count()
        sys.setprofile(lambda *_: next(counted) and None)
        try:
            result.apply(events[-1])
        finally:
            sys.setprofile(None)
        return next(counted)

    assert calls(500) == calls(50)
