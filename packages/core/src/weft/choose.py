"""Choosing the sender of every copy: nearest holders, bytes as even as can be, then few peers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.balance import fill_level, quotas
from weft.holders import Shares
from weft.table import Int64s, Ragged, distinct, pairs_by_key, stable_order

_TOLERANCE = 64
"""A copy between two senders' quotas goes to one of them when that shifts at most 1/64 of the mean load."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A copy that several members send, in ranges of its bytes."""

    copy: int
    ends: tuple[int, ...]
    """Where each range ends, in bytes from the copy's beginning; the last is its size."""
    senders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """Who sends what."""

    sender: Int64s
    """Member per copy; of a copy that is cut, its first one."""
    cuts: tuple[Cut, ...]
    """In the order of copies."""
    bound: int
    """Bytes that the busiest sender sends at least, whatever is chosen."""


def choose_senders(shares: Shares, target: Int64s, nbytes: Int64s, sources: Int64s, least_cut: int) -> Choice:
    """Choose for copies in plan order: copy i is for member `target[i]` and `nbytes[i]` > 0 long.

    `sources` are all members that could send at all. Shares of few candidates come first: they decide which members
    meet anyway, and the others follow them as far as quotas go (trap 74). What is left of a share is laid end to end by
    target and cut by quotas; a copy across a cut goes to the sender that has more of it, or is divided between them
    where that would tip the balance and both parts have `least_cut` bytes.
    """
    count = int(max(sources.max(initial=0), target.max(initial=0))) + 1
    candidates = shares.candidates
    demand = np.zeros(len(candidates), dtype=np.int64)
    np.add.at(demand, shares.share, nbytes)
    quota, bound = quotas(candidates, demand, count)
    tolerance = max(1, int(demand.sum()) // max(1, len(sources)) // _TOLERANCE)
    sender = np.empty(len(target), dtype=np.int64)
    cuts: list[Cut] = []
    met = np.zeros(count * count, dtype=bool)
    sizes = candidates.sizes[shares.share]
    for size in np.unique(sizes).tolist():
        rows = np.flatnonzero(sizes == size)
        share = shares.share[rows]
        if size == 1:
            sender[rows] = candidates.values[candidates.starts[share]]
        else:
            tier = _Tier(rows, share, target[rows], nbytes[rows])
            entry, left = _follow(tier, candidates, quota, np.flatnonzero(met), count, tolerance, least_cut)
            cuts += _lay_out(tier, entry, left, candidates, tolerance, least_cut)
            sender[rows] = candidates.values[entry]
        met[target[rows] * count + sender[rows]] = True
    return Choice(sender, tuple(sorted(cuts, key=lambda cut: cut.copy)), bound)


@dataclass(frozen=True, slots=True)
class _Tier:
    """Copies of shares with equally many candidates."""

    rows: Int64s
    share: Int64s
    target: Int64s
    nbytes: Int64s


def _follow(
    tier: _Tier, candidates: Ragged, quota: Int64s, met: Int64s, count: int, tolerance: int, least_cut: int
) -> tuple[Int64s, Int64s]:
    """Give copies to candidates that their target meets already, up to their quotas.

    Returns the entry of `candidates.values` per copy (-1 where there is none) and the quotas that are left.
    """
    entry = np.full(len(tier.rows), -1, dtype=np.int64)
    pairs, pair_of_copy = distinct(tier.share * count + tier.target, len(candidates) * count)
    pair, peer = pairs_by_key(pairs % count, met // count)
    keys = candidates.rows() * count + candidates.values
    query = pairs[pair] // count * count + met[peer] % count
    place = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    known = keys[place] == query
    if not known.any():
        return entry, quota
    preferred = np.full(len(pairs), len(keys), dtype=np.int64)
    np.minimum.at(preferred, pair[known], place[known])
    wish = preferred[pair_of_copy]
    rows = np.flatnonzero(wish < len(keys))
    rows = rows[stable_order(wish[rows], len(keys))]
    size, where = tier.nbytes[rows], wish[rows]
    end = np.cumsum(size)
    first = np.searchsorted(where, where)
    within = end - (end - size)[first]
    granted = within - size // 2 <= quota[where]
    granted &= (size < 2 * least_cut) | (within - quota[where] <= tolerance)
    entry[rows[granted]] = where[granted]
    used = np.zeros(len(keys), dtype=np.int64)
    np.add.at(used, where[granted], size[granted])
    left = quota.copy()
    for n in np.unique(tier.share[rows[granted]]).tolist():
        own = slice(int(candidates.starts[n]), int(candidates.starts[n] + candidates.sizes[n]))
        rest = int(quota[own].sum() - used[own].sum())
        left[own] = fill_level(used[own] - quota[own], rest)
    return entry, left


def _lay_out(
    tier: _Tier, entry: Int64s, quota: Int64s, candidates: Ragged, tolerance: int, least_cut: int
) -> list[Cut]:
    """Lay what has no sender yet end to end, share by share, and cut it by quotas; fills in `entry`."""
    rows = np.flatnonzero(entry < 0)
    rows = rows[stable_order(tier.share[rows], len(candidates))]
    if not len(rows):
        return []
    open_share = np.zeros(len(candidates), dtype=bool)
    open_share[tier.share[rows]] = True
    entries = np.flatnonzero(open_share[candidates.rows()])
    bounds = np.cumsum(quota[entries])
    size = tier.nbytes[rows]
    end = np.cumsum(size)
    begin = end - size
    entry[rows] = entries[_passed(bounds, begin + size // 2)]
    first, last = _passed(bounds, begin), _passed(bounds, end - 1)
    cuts = []
    for n in np.flatnonzero((first < last) & (size >= 2 * least_cut)).tolist():
        marks = [int(begin[n]), *bounds[first[n] : last[n]].tolist(), int(end[n])]
        if len(marks) == 3 and min(marks[1] - marks[0], marks[2] - marks[1]) <= tolerance:
            continue
        ends, senders = [], []
        for k in range(len(marks) - 1):
            if marks[k + 1] - marks[k] >= least_cut:
                ends.append(marks[k + 1] - marks[0])
                senders.append(int(candidates.values[entries[first[n] + k]]))
        if len(ends) > 1:
            ends[-1] = marks[-1] - marks[0]
            cuts.append(Cut(int(tier.rows[rows[n]]), tuple(ends), tuple(senders)))
    return cuts


def _passed(bounds: Int64s, values: Int64s) -> Int64s:
    """How many of the bounds are at most each value; both ascend, and bounds are few."""
    steps = np.bincount(np.searchsorted(values, bounds), minlength=len(values) + 1)
    return np.cumsum(steps[: len(values)])
