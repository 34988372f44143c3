"""Lowering: from a plan's copies to one member's buckets. Both ends of a bucket compute it alike, from the plan
alone (trap 42).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weft.copies import Copies
from weft.errors import ConfigError
from weft.plan import Plan
from weft.policy import Policy
from weft.slices import Slice
from weft.statistics import run_elements as run_lengths
from weft.table import Int64s, ragged_ranges

Bools = npt.NDArray[np.bool_]

SLOTS = 2
"""Staging slots per pair of members and direction: one is filled while the other moves."""
ALIGNMENT = 64
"""Bytes to which copies are aligned in a staging slot, so that no dtype is ever misaligned (trap 27)."""
_BUCKETS_PER_PAIR = 1 << 24


@dataclass(frozen=True, slots=True)
class LoweredBucket:
    """Copies between one pair of members that move together."""

    index: int
    """Unique in the plan."""
    peer: str
    group: int
    """Group of the receiver's layout."""
    counted: bool
    """Whether its elements stand for themselves in the digest of the receiving replica."""
    copies: Copies
    nbytes: int
    """Payload bytes."""
    slot: int | None
    """Staging slot it passes through, or None where its segments go straight between final buffers."""
    staged: int
    """How many packed buckets of this pair come before it: a packed bucket needs that many less `SLOTS` slots given
    back.
    """
    scratch: int | None
    """Which of the receiver's scratch groups it is for, counted from 0; None where it goes to live memory."""
    offsets: Int64s
    """Byte offset of every copy in the slot; empty for direct buckets."""
    gathered: Bools
    """Per copy of a packed bucket: whether it leaves from the slot, and not straight from its buffer, where it is dense
    and long enough for a segment of its own. Empty for direct buckets.
    """
    scattered: Bools
    """The same at the receiver: whether it arrives in the slot."""


@dataclass(frozen=True, slots=True)
class MemberProgram:
    """What one member does in every refit of a plan."""

    name: str
    local: Copies
    """Copies within this member."""
    sends: tuple[LoweredBucket, ...]
    """In the order in which they are to be sent."""
    receives: tuple[LoweredBucket, ...]
    slot_bytes: int
    """Size of every staging slot of the plan."""


def lower(own: Slice) -> MemberProgram:
    """The buckets of one member. Raises `ConfigError` when the staging budget is too small for the plan's peers."""
    slot_bytes = staging_slot_bytes(own)
    copies, me, names = own.copies(), own.me, [member.name for member in own.members]
    within = copies.source == copies.target
    pairs = copies.source * len(names) + copies.target
    sends: list[LoweredBucket] = []
    receives: list[LoweredBucket] = []
    for pair in np.unique(pairs[~within]).tolist():
        source, target = divmod(pair, len(names))
        number = own.numbers[source] * own.count + own.numbers[target]
        rows = copies.select(np.flatnonzero(pairs == pair))
        buckets = _pair_buckets(own, rows, number, names[target if source == me else source], slot_bytes)
        (sends if source == me else receives).extend(buckets)
    # Receivers in turn within a group, so that no sender starts all its receivers on the same one (each begins after
    # itself).
    number_of = dict(zip(names, own.numbers, strict=True))
    turn = number_of[own.name]
    sends.sort(key=lambda b: (b.group, b.index % _BUCKETS_PER_PAIR, (number_of[b.peer] - turn) % own.count))
    receives.sort(key=lambda b: (b.group, b.index))
    return MemberProgram(own.name, copies.select(np.flatnonzero(within)), tuple(sends), tuple(receives), slot_bytes)


def staging_slot_bytes(plan: Plan | Slice) -> int:
    """One size for all staging slots, so that no member's slots exceed `Policy.staging_bytes` in either direction."""
    policy, most = plan.policy, plan.most_peers
    share = policy.staging_bytes // (SLOTS * most)
    if share < 4096:
        raise ConfigError(
            f"staging_bytes is {policy.staging_bytes}, but a member has {most} peers with {SLOTS} slots each: "
            f"set at least {4096 * SLOTS * most}"
        )
    return int(min(share, policy.bucket_bytes)) // 4096 * 4096


def _pair_buckets(own: Slice, rows: Copies, pair: int, peer: str, slot_bytes: int) -> list[LoweredBucket]:
    policy, width = own.policy, own.item_bytes
    plain = np.array([tensor.source_dtype == tensor.target_dtype for tensor in own.tensors])

    def uncast(copies: Copies) -> Bools:
        """Whether the bits travel as the sender has them; what was received has been cast already."""
        return plain[copies.tensor] | ~own.is_source[copies.source]

    direct = uncast(rows) & (run_elements(rows) * width[rows.tensor] >= policy.direct_run_bytes)
    pieces: list[Copies] = []
    keys: list[tuple[Int64s, ...]] = []
    for kind, limit in ((0, policy.bucket_bytes), (1, slot_bytes)):
        part = rows.select(np.flatnonzero(direct if kind == 0 else ~direct))
        part = _divide(part, _most_elements(part, limit // width[part.tensor], policy.max_segments, kind == 0))
        pieces.append(part)
        keys.append((part.group, np.full(len(part), kind, np.int64), 1 - part.counted, np.arange(len(part))))
    both = Copies(*(np.concatenate([getattr(p, f) for p in pieces]) for f in Copies.__slots__))
    columns = [np.concatenate([k[n] for k in keys]) for n in range(4)]
    order = np.lexsort(columns[::-1])
    both, group, kind, uncounted = both.select(order), columns[0][order], columns[1][order], columns[2][order]
    nbytes = both.numel * width[both.tensor]
    long = nbytes >= policy.direct_run_bytes
    gathered = ~(long & uncast(both) & _dense(both.sizes, both.source_strides))
    scattered = ~(long & _dense(both.sizes, both.target_strides))
    # In a packed bucket, what does not go from slot to slot is a segment, and parts those around it.
    segments = np.where(kind == 1, 2 * ~(gathered & scattered), both.numel // run_elements(both))
    buckets: list[LoweredBucket] = []
    staged = 0
    for first, last in _bounds(np.stack([group, kind, uncounted], axis=1), nbytes, segments, policy, slot_bytes):
        packed = bool(kind[first])
        padded = -(-nbytes[first:last] // ALIGNMENT) * ALIGNMENT
        buckets.append(
            LoweredBucket(
                index=pair * _BUCKETS_PER_PAIR + len(buckets), peer=peer, group=int(group[first]),
                counted=not uncounted[first], copies=both.select(np.arange(first, last)),
                nbytes=int(nbytes[first:last].sum()), slot=staged % SLOTS if packed else None, staged=staged,
                scratch=int(both.scratch[first]) if both.scratch[first] >= 0 else None,
                offsets=np.cumsum(padded) - padded if packed else np.zeros(0, np.int64),
                gathered=gathered[first:last] if packed else np.zeros(0, bool),
                scattered=scattered[first:last] if packed else np.zeros(0, bool),
            )
        )  # fmt: skip
        staged += packed
    return buckets


def _most_elements(part: Copies, elements: Int64s, max_segments: int, direct: bool) -> Int64s:
    """Bounds of one copy: bytes and, where it goes straight, runs as well."""
    return np.minimum(elements, max_segments * run_elements(part)) if direct else elements


def _bounds(keys: Int64s, nbytes: Int64s, segments: Int64s, policy: Policy, slot_bytes: int) -> list[tuple[int, int]]:
    """Cut ordered copies into buckets: never across keys, never beyond the bounds of the policy."""
    bounds: list[tuple[int, int]] = []
    first, size, count = 0, 0, 0
    key_rows, size_rows, segment_rows = keys.tolist(), nbytes.tolist(), segments.tolist()
    for n, (key, length, runs) in enumerate(zip(key_rows, size_rows, segment_rows, strict=True)):
        packed = bool(key[1])
        length = -(-length // ALIGNMENT) * ALIGNMENT if packed else length
        limit = slot_bytes if packed else policy.bucket_bytes
        full = size + length > limit or count + runs + packed > policy.max_segments
        if n > first and (key != key_rows[first] or full):
            bounds.append((first, n))
            first, size, count = n, 0, 0
        size, count = size + length, count + runs
    if len(keys):
        bounds.append((first, len(keys)))
    return bounds


def run_elements(rows: Copies) -> Int64s:
    """Elements per run that is contiguous in both buffers, per copy."""
    return run_lengths(rows.sizes, rows.source_strides, rows.target_strides)


def _dense(sizes: Int64s, strides: Int64s) -> Bools:
    """Whether a copy is one run in the buffer at one end."""
    return np.asarray(run_lengths(sizes, strides, strides) == sizes.prod(axis=1))


def _divide(rows: Copies, limit: Int64s) -> Copies:
    """Cut copies of more than `limit` elements along their outermost axes."""
    while True:
        big = np.flatnonzero(rows.numel > limit)
        if not len(big):
            return rows
        axis = (rows.sizes[big] > 1).argmax(axis=1)
        inner = rows.numel[big] // rows.sizes[big, axis]
        step = np.maximum(1, limit[big] // inner)
        parts = -(-rows.sizes[big, axis] // step)
        counts = np.ones(len(rows.source), dtype=np.int64)
        counts[big] = parts
        owner, number = ragged_ranges(np.zeros(len(counts), np.int64), counts)
        full_axis = np.zeros(len(counts), np.int64)
        full_step = np.zeros(len(counts), np.int64)
        full_axis[big], full_step[big] = axis, step
        cut = counts[owner] > 1
        rows, limit = rows.select(owner), limit[owner]
        n = np.flatnonzero(cut)
        at, begin = full_axis[owner[n]], number[n] * full_step[owner[n]]
        sizes = rows.sizes.copy()
        sizes[n, at] = np.minimum(full_step[owner[n]], rows.sizes[n, at] - begin)
        moved = {}
        for start, strides in (
            ("source_offset", rows.source_strides),
            ("target_offset", rows.target_strides),
            ("logical_start", rows.logical_strides),
        ):
            moved[start] = getattr(rows, start).copy()
            moved[start][n] += begin * strides[n, at]
        rows = Copies(**{f: {**moved, "sizes": sizes}.get(f, getattr(rows, f)) for f in Copies.__slots__})
