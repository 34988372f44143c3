"""Choosing the sender of every copy: nearest holders, bytes as even as can be, then few peers.

Members of one layout want the same, so copies are not looked at one by one: all that a member wants of what the same
members hold is a delivery, and only where a quota ends within one is its copies' size looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import groupby

import numpy as np

from weft.balance import fill_level, quotas
from weft.holders import Shares
from weft.table import Int64s, Ragged, distinct, pairs_by_key, stable_order

_TOLERANCE = 64
"""A copy between two senders' quotas goes to one of them when that shifts at most 1/64 of the mean load."""


@dataclass(frozen=True, slots=True)
class Lots:
    """Copies laid end to end, lot by lot; whoever gets one copy of a lot gets all of it."""

    starts: Int64s
    """First copy of every lot, and the number of copies behind them."""
    before: Int64s
    """Bytes of all copies before each, and of all behind them."""

    @classmethod
    def of(cls, copies: Int64s, nbytes: Int64s) -> Lots:
        """From the number of copies per lot, and the bytes of every copy, more than none."""
        return cls(np.concatenate([[0], np.cumsum(copies)]), np.concatenate([[0], np.cumsum(nbytes)]))


@dataclass(frozen=True, slots=True)
class Runs:
    """Neighbouring copies of one lot that one member sends to another. Shapes (n,)."""

    target: Int64s
    """Member."""
    first: Int64s
    """Copy of `Lots`."""
    last: Int64s
    """The copy behind them."""
    sender: Int64s
    """Member."""
    until: Int64s
    """Of a copy that several members send, in ranges of its bytes: where this member's ends; 0 for whole copies."""

    def select(self, rows: Int64s) -> Runs:
        """Those at `rows`, in that order."""
        return Runs(*(getattr(self, column.name)[rows] for column in fields(self)))

    @classmethod
    def joined(cls, parts: list[Runs]) -> Runs:
        """One behind the other."""
        return cls(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(cls)))


@dataclass(frozen=True, slots=True)
class Choice:
    """Who sends what."""

    runs: Runs
    """Ranges of one copy are in their order."""
    bound: int
    """Bytes that the busiest sender sends at least, whatever is chosen."""


def choose_senders(shares: Shares, target: Int64s, lot: Int64s, lots: Lots, sources: Int64s, least_cut: int) -> Choice:
    """Choose for deliveries in plan order: delivery i brings lot `lot[i]` to member `target[i]`.

    `sources` are all members that could send at all. Shares of few candidates come first: they decide which members
    meet anyway, and the others follow them as far as quotas go (trap 74). What is left of a share is laid end to end by
    target and cut by quotas; a copy across a cut goes to the sender that has more of it, or is divided between them
    where that would tip the balance and both parts have `least_cut` bytes.
    """
    count = int(max(sources.max(initial=0), target.max(initial=0))) + 1
    candidates = shares.candidates
    first, last = lots.starts[lot], lots.starts[lot + 1]
    demand = np.zeros(len(candidates), dtype=np.int64)
    np.add.at(demand, shares.share, lots.before[last] - lots.before[first])
    quota, bound = quotas(candidates, demand, count)
    tolerance = max(1, int(demand.sum()) // max(1, len(sources)) // _TOLERANCE)
    chosen: list[Runs] = []
    met = np.zeros(count * count, dtype=bool)
    sizes = candidates.sizes[shares.share]
    for size in np.unique(sizes).tolist():
        rows = np.flatnonzero(sizes == size)
        rest = _Open(shares.share[rows], target[rows], first[rows], last[rows])
        if size == 1:
            found = [_runs(rest, candidates.values[candidates.starts[rest.share]])]
        else:
            known, rest, left = _follow(rest, lots, candidates, quota, np.flatnonzero(met), count, tolerance, least_cut)
            found = [known, *_lay_out(rest, lots, left, candidates, tolerance, least_cut)]
        for runs in found:
            met[runs.target * count + runs.sender] = True
        chosen += found
    return Choice(Runs.joined(chosen), bound)


@dataclass(frozen=True, slots=True)
class _Open:
    """Neighbouring copies that have no sender yet."""

    share: Int64s
    target: Int64s
    first: Int64s
    last: Int64s

    def select(self, rows: Int64s) -> _Open:
        return _Open(self.share[rows], self.target[rows], self.first[rows], self.last[rows])


def _runs(copies: _Open, sender: Int64s) -> Runs:
    return Runs(copies.target, copies.first, copies.last, sender, np.zeros_like(sender))


def _follow(
    wanted: _Open, lots: Lots, candidates: Ragged, quota: Int64s, met: Int64s, count: int, tolerance: int,
    least_cut: int,
) -> tuple[Runs, _Open, Int64s]:  # fmt: skip
    """Give copies to candidates that their target meets already, up to their quotas.

    Returns what they send, what is left, and the quotas that are left.
    """
    pairs, pair_of_row = distinct(wanted.share * count + wanted.target, len(candidates) * count)
    pair, peer = pairs_by_key(pairs % count, met // count)
    keys = candidates.rows() * count + candidates.values
    query = pairs[pair] // count * count + met[peer] % count
    place = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    known = keys[place] == query
    preferred = np.full(len(pairs), len(keys), dtype=np.int64)
    np.minimum.at(preferred, pair[known], place[known])
    wish = preferred[pair_of_row]
    rows = np.flatnonzero(wish < len(keys))
    rows = rows[stable_order(wish[rows], len(keys))]
    where, first, last = wish[rows], wanted.first[rows], wanted.last[rows]
    size = lots.before[last] - lots.before[first]
    end = np.cumsum(size)
    begin = end - size
    begin -= begin[np.searchsorted(where, where)]
    # Up to the quota; the copy across its end is granted too if more than half of it is within, unless it is divided.
    at = lots.before[first] + quota[where] - begin
    copy = np.clip(np.searchsorted(lots.before, at, side="right") - 1, first, last - 1)
    copy_size = lots.before[copy + 1] - lots.before[copy]
    over = lots.before[copy + 1] - at
    granted = over <= copy_size // 2
    granted &= (copy_size < 2 * least_cut) | (over <= tolerance)
    middle = wanted.first.copy()
    middle[rows] = np.where(at <= lots.before[first], first, copy + granted)
    used = np.zeros(len(keys), dtype=np.int64)
    np.add.at(used, where, lots.before[middle[rows]] - lots.before[first])
    left = quota.copy()
    given = rows[middle[rows] > first]
    for n in np.unique(wanted.share[given]).tolist():
        own = slice(int(candidates.starts[n]), int(candidates.starts[n] + candidates.sizes[n]))
        left[own] = fill_level(used[own] - quota[own], int(quota[own].sum() - used[own].sum()))
    followed = _Open(wanted.share[given], wanted.target[given], wanted.first[given], middle[given])
    later = np.flatnonzero(middle < wanted.last)
    remaining = _Open(wanted.share[later], wanted.target[later], middle[later], wanted.last[later])
    return _runs(followed, candidates.values[wish[given]]), remaining, left


def _lay_out(
    wanted: _Open, lots: Lots, quota: Int64s, candidates: Ragged, tolerance: int, least_cut: int
) -> list[Runs]:
    """Lay what has no sender yet end to end, share by share, and cut it by quotas."""
    wanted = wanted.select(stable_order(wanted.share, len(candidates)))
    open_share = np.zeros(len(candidates), dtype=bool)
    open_share[wanted.share] = True
    entries = np.flatnonzero(open_share[candidates.rows()])
    senders = candidates.values[entries]
    size = lots.before[wanted.last] - lots.before[wanted.first]
    end = np.cumsum(size)
    begin = end - size
    bounds = np.cumsum(quota[entries])
    bounds = bounds[bounds < size.sum()]
    row = np.searchsorted(end, bounds, side="right")
    at = lots.before[wanted.first[row]] + bounds - begin[row]
    copy = np.searchsorted(lots.before, at, side="right") - 1
    middle = lots.before[copy] + (lots.before[copy + 1] - lots.before[copy]) // 2
    # A run begins where its row does, and behind every bound: with the copy across it, or after that.
    starts = [
        np.stack([np.arange(len(begin)), wanted.first, np.searchsorted(bounds, begin, side="right")]),
        np.stack([row, copy + (middle < at), np.arange(1, len(bounds) + 1)]),
    ]
    ranges: list[tuple[int, int, int, int]] = []
    across = np.flatnonzero((at > lots.before[copy]) & (lots.before[copy + 1] - lots.before[copy] >= 2 * least_cut))
    for (owner, number), group in groupby(across.tolist(), key=lambda n: (int(row[n]), int(copy[n]))):
        passed = list(group)
        marks = [int(lots.before[number]), *at[passed].tolist(), int(lots.before[number + 1])]
        if shared := _shared(marks, tolerance, least_cut):
            ranges += [(owner, number, int(senders[passed[0] + n]), until) for n, until in shared]
            starts.append(np.array([[owner, owner], [number, number + 1], [len(senders), passed[-1] + 1]]))
    owner, start, place = np.concatenate(starts, axis=1)
    order = np.lexsort((place, start, owner))
    owner, start, place = owner[order], start[order], place[order]
    stop = np.where(owner == np.append(owner[1:], -1), np.append(start[1:], 0), wanted.last[owner])
    kept = np.flatnonzero((start < stop) & (place < len(senders)))
    owner = owner[kept]
    runs = Runs(wanted.target[owner], start[kept], stop[kept], senders[place[kept]], np.zeros_like(owner))
    row, copy, sender, until = np.array(ranges, dtype=np.int64).reshape(-1, 4).T
    return [runs, Runs(wanted.target[row], copy, copy + 1, sender, until)]


def _shared(marks: list[int], tolerance: int, least_cut: int) -> list[tuple[int, int]]:
    """Which senders of the ranges between `marks` share a copy, and where each one's part ends; none where one of them
    sends all of it.
    """
    if len(marks) == 3 and min(marks[1] - marks[0], marks[2] - marks[1]) <= tolerance:
        return []
    long = [n for n in range(len(marks) - 1) if marks[n + 1] - marks[n] >= least_cut]
    ends = [*(marks[n + 1] - marks[0] for n in long[:-1]), marks[-1] - marks[0]]
    return list(zip(long, ends, strict=True)) if len(long) > 1 else []
