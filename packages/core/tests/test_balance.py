"""Quotas and senders are as level as any could be: checked against linear programming (scipy's HiGHS)."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from weft.balance import fill_level, lower_bound, quotas
from weft.choose import Choice, Lots, choose_senders
from weft.holders import Shares
from weft.table import Int64s, Ragged

seeds = st.integers(0, 2**32 - 1)


def ragged(lists: list[list[int]]) -> Ragged:
    return Ragged.of([np.array(each, dtype=np.int64) for each in lists])


def choose(
    share: Int64s, candidates: list[list[int]], target: Int64s, nbytes: Int64s, members: int, least_cut: int
) -> tuple[Choice, list[int]]:
    """Those of one share to one target are a lot. Returns the copies in the order of lots, too."""
    order = np.lexsort((share, target))
    lots, sizes = np.unique(np.stack([target, share], axis=1)[order], axis=0, return_counts=True)
    shares = Shares(lots[:, 1], ragged(candidates), np.zeros(len(lots), np.int64))
    choice = choose_senders(
        shares, lots[:, 0], np.arange(len(lots)), Lots.of(sizes, nbytes[order]), np.arange(members), least_cut
    )
    return choice, order.tolist()


def optimum(candidates: list[list[int]], demand: list[int], members: int) -> float:
    """The least possible load of the busiest member, copies divided at will."""
    entries = [(share, member) for share, held in enumerate(candidates) for member in held]
    cost = [0.0] * len(entries) + [1.0]
    equal = [[float(s == share) for s, _ in entries] + [0.0] for share in range(len(candidates))]
    below = [[float(m == member) for _, m in entries] + [-1.0] for member in range(members)]
    found = linprog(cost, A_ub=below, b_ub=[0.0] * members, A_eq=equal, b_eq=demand)
    assert found.success
    return float(found.fun)


def problem(random: Random) -> tuple[list[list[int]], list[int], int]:
    members = random.randint(1, 12)
    shares = random.randint(1, 10)
    candidates = [sorted(random.sample(range(members), random.randint(1, members))) for _ in range(shares)]
    return candidates, [random.choice((0, 1, 10**3, 10**6, random.randint(0, 10**9))) for _ in range(shares)], members


@given(seeds)
@settings(max_examples=300, deadline=None)
def test_quotas_and_bound_meet_the_fractional_optimum(seed: int) -> None:
    candidates, demand, members = problem(Random(seed))
    lists = ragged(candidates)
    quota, bound = quotas(lists, np.array(demand, dtype=np.int64), members)
    for share, size in enumerate(demand):
        own = quota[lists.starts[share] : lists.starts[share] + lists.sizes[share]]
        assert own.sum() == size
        assert (own >= 0).all()
    load = np.bincount(lists.values, weights=quota, minlength=members)
    best = optimum(candidates, demand, members)
    assert bound <= np.ceil(best) + 1e-6 * best
    assert load.max() <= 1.05 * best + len(demand)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(0, 10**7))
def test_water_finds_its_level(loads: list[int], amount: int) -> None:
    part = fill_level(np.array(loads, dtype=np.int64), amount)
    assert part.sum() == amount
    assert (part >= 0).all()
    filled = part + loads
    assert filled[part > 0].max(initial=0) <= filled.min() + 1


def test_the_bound_counts_what_only_the_busy_can_send() -> None:
    lists = ragged([[0, 1], [0, 1, 2, 3]])
    demand = np.array([100, 20], dtype=np.int64)
    quota, bound = quotas(lists, demand, 4)
    assert bound == 50
    assert np.bincount(lists.values, weights=quota).tolist() == [50, 50, 10, 10]
    assert lower_bound(lists, demand, np.array([50, 50, 10, 10])) == 50


@given(seeds)
@settings(max_examples=200, deadline=None)
@pytest.mark.trap(10, 73)
def test_senders_hold_what_they_send_and_are_level(seed: int) -> None:
    random = Random(seed)
    candidates, _, members = problem(random)
    copies = random.randint(1, 200)
    share = np.array([random.randrange(len(candidates)) for _ in range(copies)], dtype=np.int64)
    target = np.sort(np.array([random.randrange(8) for _ in range(copies)], dtype=np.int64) + members)
    nbytes = np.array([random.randint(1, 10 ** random.randint(0, 6)) for _ in range(copies)], dtype=np.int64)
    choice, order = choose(share, candidates, target, nbytes, members, 1)
    load = [0] * members
    sent = [0] * copies
    runs = choice.runs
    for n in range(len(runs.sender)):
        for copy in order[runs.first[n] : runs.last[n]]:
            end = int(runs.until[n] or nbytes[copy])
            assert end > sent[copy]
            assert runs.sender[n] in candidates[share[copy]]
            assert runs.target[n] == target[copy]
            load[runs.sender[n]] += end - sent[copy]
            sent[copy] = end
    assert sent == nbytes.tolist()
    demand = [int(nbytes[share == s].sum()) for s in range(len(candidates))]
    best = optimum(candidates, demand, members)
    # A copy across a quota's end shifts at most 1/64 of the mean load, once per share and sender.
    slack = (len(candidates) + 1) * (sum(demand) / members / 64 + 1)
    assert max(load) <= 1.05 * best + slack
    assert choice.bound <= np.ceil(best) + 1e-6 * best


@pytest.mark.trap(74)
def test_those_who_meet_anyway_serve_each_other() -> None:
    """Each target gets an expert from one of 8 sources, and must get what all 8 hold: then from the same one."""
    targets = np.repeat(np.arange(8, 16), 2)
    share = np.array([n // 2 if n % 2 == 0 else 8 for n in range(16)], dtype=np.int64)
    candidates = [*([(3 * n) % 8] for n in range(8)), list(range(8))]
    choice, order = choose(share, candidates, targets, np.full(16, 100, dtype=np.int64), 8, 1 << 20)
    runs = choice.runs
    sender = {c: int(runs.sender[n]) for n in range(16) for c in order[runs.first[n] : runs.last[n]]}
    assert [sender[n] for n in range(16)] == [m for n in range(8) for m in [(3 * n) % 8] * 2]
    assert not runs.until.any()


def test_one_copy_that_eight_hold_is_sent_by_all_eight() -> None:
    choice, _ = choose(np.zeros(1, np.int64), [list(range(8))], np.array([8]), np.array([8_000_000]), 8, 1000)
    assert choice.runs.sender.tolist() == list(range(8))
    assert choice.runs.until.tolist() == [1_000_000 * n for n in range(1, 9)]
