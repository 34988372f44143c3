"""Rounds: nobody has two partners in one, every pair has one, and there are as few as can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from weft_nvshmem.schedule import Pair, Schedule

NAMES = [f"m{number:02}" for number in range(12)]


def conflicts(rounds: list[list[Pair]]) -> list[list[Pair]]:
    return [each for each in rounds for side in (0, 1) if len({pair[side] for pair in each}) < len(each)]


def everybody(schedule: Schedule) -> list[Pair]:
    return [(s, r) for s in schedule.senders for r in schedule.receivers if s != r]


@pytest.mark.parametrize("n", range(1, 13))
def test_an_all_to_all_of_n_has_n_minus_one_rounds_in_which_everybody_sends_and_receives(n: int) -> None:
    schedule = Schedule.of([(name, True, True) for name in NAMES[:n]])
    rounds = schedule.rounds(everybody(schedule))
    assert len(rounds) == n - 1
    assert all(len(each) == n for each in rounds)
    assert conflicts(rounds) == []


@pytest.mark.trap(10)
@given(some.integers(1, 12), some.integers(1, 12), some.randoms(use_true_random=False))
def test_senders_and_receivers_apart_have_as_many_rounds_as_the_larger_side(s: int, r: int, random: object) -> None:
    roles = [(f"s{i}", True, False) for i in range(s)] + [(f"r{i}", False, True) for i in range(r)]
    random.shuffle(roles)  # type: ignore[attr-defined]
    schedule = Schedule.of(roles)
    rounds = schedule.rounds(everybody(schedule))
    assert len(rounds) == max(s, r)
    assert all(len(each) == min(s, r) for each in rounds)
    assert conflicts(rounds) == []


@given(some.lists(some.tuples(some.booleans(), some.booleans()), min_size=1, max_size=12), some.data())
def test_every_pattern_is_complete_without_conflicts_in_no_more_rounds_than_the_larger_side(
    sides: list[tuple[bool, bool]], data: some.DataObject
) -> None:
    schedule = Schedule.of([(name, *side) for name, side in zip(NAMES, sides, strict=False)])
    possible = everybody(schedule)
    pattern = data.draw(some.lists(some.sampled_from(possible), unique=True)) if possible else []
    rounds = schedule.rounds(pattern)
    assert sorted(pair for each in rounds for pair in each) == sorted(pattern)
    assert conflicts(rounds) == []
    assert len(rounds) <= max(len(schedule.senders), len(schedule.receivers))


def test_whoever_is_on_no_side_still_has_a_round() -> None:
    schedule = Schedule.of([("a", False, True), ("b", True, False)])
    assert schedule.round_of("a", "b") == 0
    assert Schedule((), ()).round_of("x", "y") == 0
