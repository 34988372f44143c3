"""How many bytes each holder sends of each share: as even as geometry and locality allow.

Equal quotas within every share are best where shares do not overlap, or overlap evenly, which is nearly always. Where
they do not suffice, a few rounds move quotas from busy members to idle ones. `lower_bound` says how good any plan could
be: members U must at least send whatever only members of U hold, so one of them sends |U|-th of it. It holds for every
U; trying the busiest members first finds the tight one when loads are level.
"""

from __future__ import annotations

import numpy as np

from weft.table import Int64s, Ragged

ROUNDS = 8
_MOST_STEPS = 20_000
"""Shares times rounds: beyond it, fewer rounds."""
_GOOD_ENOUGH = 101
"""Percent of the bound at which no more rounds are made."""


def quotas(candidates: Ragged, demand: Int64s, members: int) -> tuple[Int64s, int]:
    """(bytes per entry of `candidates.values`, lower bound in bytes of the busiest member).

    `demand` is bytes per share. Integers only, so every machine decides alike (trap 73).
    """
    share = candidates.rows()
    place = np.arange(len(share), dtype=np.int64) - candidates.starts[share]
    size = candidates.sizes[share]
    quota = demand[share] // size + (place < demand[share] % size)
    load = np.zeros(members, dtype=np.int64)
    np.add.at(load, candidates.values, quota)
    bound = lower_bound(candidates, demand, load)
    movable = np.flatnonzero((candidates.sizes > 1) & (demand > 0)).tolist()
    for _ in range(min(ROUNDS, _MOST_STEPS // max(1, len(movable)))):
        if int(load.max(initial=0)) * 100 <= bound * _GOOD_ENOUGH:
            break
        for n in movable:
            own = slice(int(candidates.starts[n]), int(candidates.starts[n] + candidates.sizes[n]))
            who = candidates.values[own]
            others = load[who] - quota[own]
            quota[own] = fill_level(others, int(demand[n]))
            load[who] = others + quota[own]
        bound = max(bound, lower_bound(candidates, demand, load))
    return quota, bound


def lower_bound(candidates: Ragged, demand: Int64s, load: Int64s) -> int:
    """Bytes that the busiest member sends at least, in any plan (rounded up)."""
    if not len(candidates):
        return 0
    rank = np.empty(len(load), dtype=np.int64)
    rank[np.argsort(-load, kind="stable")] = np.arange(len(load))
    last = np.maximum.reduceat(rank[candidates.values], candidates.starts)
    confined = np.zeros(len(load), dtype=np.int64)
    np.add.at(confined, last, demand)
    total = np.cumsum(confined)
    return int((-(-total // np.arange(1, len(load) + 1))).max(initial=0))


def fill_level(loads: Int64s, amount: int) -> Int64s:
    """Divide `amount` so that the highest of `loads` plus its part is as low as can be, like water in a basin."""
    order = np.argsort(loads, kind="stable")
    ordered = loads[order]
    before = np.cumsum(ordered)
    count = np.arange(1, len(loads) + 1)
    wet = int(np.flatnonzero(count * ordered - before <= amount)[-1]) + 1
    level, extra = divmod(amount + int(before[wet - 1]), wet)
    part = np.zeros(len(loads), dtype=np.int64)
    part[order[:wet]] = level - ordered[:wet] + (np.arange(wet) < extra)
    return part
