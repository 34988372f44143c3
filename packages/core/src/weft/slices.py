"""Slices: what one member needs of a plan, small enough to be sent to it, and proven by it against its own layouts.

Whoever planned for thousands of members publishes a slice for each, so that nobody reads the whole world. A member
trusts no planner: `prove` checks that the copies to it write every element of its layout exactly once, where it
belongs, and that the copies from it read what it says it holds.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from weft.box import refines
from weft.copies import Copies, Parts, Routes, expand, loops_of
from weft.errors import PlanError, RecordError
from weft.layout import ITEM_BYTES, Kind, Layout
from weft.member import Member
from weft.plan import Plan, PlannedTensor
from weft.policy import Policy
from weft.records import decoded
from weft.rows import Rows, in_splits, pieces_of
from weft.table import Int64s, intersect, pairs_by_key, unique_rows, volume

_COMPRESSION = 1
"""Columns of small integers shrink to a few percent at the fastest level."""
_MOST_BYTES = 1 << 30
"""A record that unpacks to more is none of ours."""
_WIDE = ("lo", "hi", "source_strides", "target_strides")


class _SliceRecord(msgspec.Struct, array_like=True):
    """What crosses a process boundary. New fields go to the end, with defaults."""

    fingerprint: str
    name: str
    members: list[Member]
    tensors: list[PlannedTensor]
    aliases: list[tuple[str, str]]
    policy: Policy
    numbers: list[int]
    count: int
    most_peers: int
    scratch_slots: list[int]
    width: int
    """Factors per split."""
    splits: bytes
    parts: dict[str, bytes]
    routes: dict[str, bytes]


@dataclass(frozen=True, eq=False)
class Slice:
    """The copies of a plan that one member sends or receives."""

    fingerprint: str
    """Of the whole plan."""
    name: str
    """The member whose slice it is."""
    members: tuple[Member, ...]
    """Itself and its peers, sorted by name."""
    tensors: tuple[PlannedTensor, ...]
    """Those that it sends or receives."""
    aliases: tuple[tuple[str, str], ...]
    """(alias, name) of these tensors."""
    policy: Policy
    numbers: tuple[int, ...]
    """The numbers of `members` in the whole plan."""
    count: int
    """Members of the whole plan."""
    most_peers: int
    """See `Plan.most_peers`."""
    scratch_slots: tuple[int, ...]
    """Of `members`; see `Plan.scratch_slots`."""
    splits: Int64s
    """Factors of every tensor, shape (tensors, k)."""
    parts: Parts
    routes: Routes
    """Numbers of members count in `members`, those of parts in `parts`."""

    @cached_property
    def item_bytes(self) -> Int64s:
        """Bytes per element of every tensor as it travels (in the target's dtype)."""
        return np.array([ITEM_BYTES[tensor.target_dtype] for tensor in self.tensors], dtype=np.int64)

    @property
    def me(self) -> int:
        """Index of the member in `members`."""
        return [member.name for member in self.members].index(self.name)

    @cached_property
    def is_source(self) -> npt.NDArray[np.bool_]:
        """Which of `members` are sources; what others send they pass on."""
        return np.array([member.is_source for member in self.members])

    def copies(self) -> Copies:
        """Its copies, spelled out; members count in `members`."""
        return expand(self.routes, self.parts, loops_of(self.parts, self.splits), np.arange(len(self.routes)))

    @cached_property
    def encoded(self) -> bytes:
        """The slice as a record: equal slices give equal bytes."""
        record = msgspec.msgpack.encode(
            _SliceRecord(
                self.fingerprint, self.name, list(self.members), list(self.tensors), list(self.aliases), self.policy,
                list(self.numbers), self.count, self.most_peers, list(self.scratch_slots),
                self.splits.shape[1], _pack(self.splits), _packed(self.parts), _packed(self.routes),
            )
        )  # fmt: skip
        return zlib.compress(record, _COMPRESSION)

    @cached_property
    def address(self) -> str:
        """SHA-256 of `encoded`, in hex."""
        return hashlib.sha256(self.encoded).hexdigest()

    @classmethod
    def decode(cls, data: bytes) -> Slice:
        """Inverse of `encoded`. Raises `RecordError` when the bytes are no slice."""
        try:
            raw = zlib.decompressobj()
            record = decoded(_SliceRecord, raw.decompress(data, _MOST_BYTES), "not a slice of a plan")
            splits = _unpack(record.splits).reshape(len(record.tensors), record.width)
            parts = {f.name: _unpack(record.parts[f.name]) for f in fields(Parts)}
            parts |= {name: parts[name].reshape(len(parts["tensor"]), record.width) for name in _WIDE}
            routes = {f.name: _unpack(record.routes[f.name]) for f in fields(Routes)}
        except (zlib.error, KeyError, ValueError) as error:
            raise RecordError(f"not a slice of a plan: {error}") from error
        found = cls(
            record.fingerprint, record.name, tuple(record.members), tuple(record.tensors), tuple(record.aliases),
            record.policy, tuple(record.numbers), record.count, record.most_peers, tuple(record.scratch_slots), splits,
            Parts(**parts), Routes(**routes),
        )  # fmt: skip
        if damage := _damage(found):
            raise RecordError(f"slice of a plan is damaged: {damage}")
        return found


def slice_of(plan: Plan, name: str) -> Slice:
    """One member's slice. Raises `KeyError` for a stranger."""
    me, routes = plan.index(name), plan.routes
    mine = plan.rows_of(me)
    part_of, part = np.unique(routes.part[mine], return_inverse=True)
    parts = plan.parts.select(part_of)
    tensor_of, tensor = np.unique(parts.tensor, return_inverse=True)
    who = np.unique(np.concatenate([routes.source[mine], routes.target[mine], [me]]))
    tensors = tuple(plan.tensors[n] for n in tensor_of.tolist())
    names = {tensor.name for tensor in tensors}
    return Slice(
        plan.fingerprint, name, tuple(plan.members[n] for n in who.tolist()), tensors,
        tuple(pair for pair in plan.aliases if pair[1] in names), plan.policy, tuple(who.tolist()), plan.count,
        plan.most_peers, tuple(plan.scratch_slots[who].tolist()), plan.splits[tensor_of],
        replace(parts, tensor=tensor),
        Routes(
            np.searchsorted(who, routes.source[mine]), np.searchsorted(who, routes.target[mine]), part,
            routes.counted[mine],
        ),
    )  # fmt: skip


def prove(own: Slice, source: Layout | None, target: Layout | None) -> None:
    """Prove a slice against its member's own layouts.

    Raises `PlanError` with everything that is wrong: elements of the target that no copy writes, or two; copies to or
    from memory that is not where the layout has their box.
    """
    index = {tensor.name: n for n, tensor in enumerate(own.tensors)}
    index |= {alias: index[name] for alias, name in own.aliases}
    me = own.me
    faults: list[str] = []
    if source is not None:
        sent = own.parts.select(np.unique(own.routes.part[own.routes.source == me]))
        ends = sent.source_buffer, sent.source_offset, sent.source_strides
        _, _, wrong = _placed(_rows(source, index, own.splits), sent, *ends)
        faults += [f"{own.tensors[n].name}: a copy reads what this source does not hold there" for n in wrong]
    if target is not None:
        got = own.parts.select(own.routes.part[own.routes.target == me])
        rows = _rows(target, index, own.splits)
        row, part, wrong = _placed(rows, got, got.target_buffer, got.target_offset, got.target_strides)
        faults += [f"{own.tensors[n].name}: a copy writes where this target does not have its box" for n in wrong]
        faults += _coverage(own, rows, got, row, part)
        if source is None:
            faults += _relay_faults(own, target, rows)
        ties = {tie.alias: tie.name for tie in target.ties}
        wanted = [target.tensors[n].name for n in np.unique(target.pieces.tensor).tolist()]
        missing = [name for name in wanted if name not in index and own.policy.moves(ties.get(name, name))]
        faults += [f"{name}: no copy writes any of it" for name in missing]
    if faults:
        raise PlanError(faults)


def _rows(layout: Layout, index: Mapping[str, int], splits: Int64s) -> Rows:
    return in_splits(pieces_of([layout], index), splits)


def _placed(
    rows: Rows, parts: Parts, buffer: Int64s, offset: Int64s, strides: Int64s
) -> tuple[Int64s, Int64s, list[int]]:
    """(row, part) of every part that lies in a row of a layout, in the row's memory; and tensors of those in none."""
    keys = np.concatenate([rows.tensor, parts.tensor]), np.concatenate([rows.buffer, buffer])
    _, key = unique_rows(np.stack(keys, axis=1))
    part, row = pairs_by_key(key[len(rows.tensor) :], key[: len(rows.tensor)])
    lo, hi = parts.lo[part], parts.hi[part]
    inside = ((rows.lo[row] <= lo) & (hi <= rows.hi[row])).all(axis=1)
    inside &= offset[part] == rows.offset[row] + ((lo - rows.lo[row]) * rows.strides[row]).sum(axis=1)
    inside &= ((strides[part] == rows.strides[row]) | (hi - lo == 1)).all(axis=1)
    lost = np.ones(len(parts), dtype=bool)
    lost[part[inside]] = False
    return row[inside], part[inside], np.unique(parts.tensor[lost]).tolist()


def _coverage(own: Slice, rows: Rows, parts: Parts, row: Int64s, part: Int64s) -> list[str]:
    """Elements of rows that no part writes, or two."""
    written = np.zeros(len(rows.tensor), dtype=np.int64)
    np.add.at(written, row, parts.numel[part])
    left, right = pairs_by_key(row, row)
    left, right = part[left[left < right]], part[right[left < right]]
    _, _, twice = intersect(parts.lo[left], parts.hi[left], parts.lo[right], parts.hi[right])
    doubled = np.unique(parts.tensor[left[twice]]).tolist()
    short = np.unique(rows.tensor[written < rows.numel]).tolist()
    return [f"{own.tensors[n].name}: elements that no copy writes" for n in short] + [
        f"{own.tensors[n].name}: elements that two copies write" for n in doubled
    ]


def _relay_faults(own: Slice, target: Layout, rows: Rows) -> list[str]:
    """What this member passes on must lie in live memory, in the group of the receiver's, and come here: from sources
    or other replicas what goes to its own replica, so that nobody waits in a ring. Other replicas come later by name.
    """
    me, routes = own.me, own.routes
    replicas = np.array([member.replica or member.name for member in own.members])
    abroad, sends = replicas != replicas[me], routes.source == me
    wrong_way = np.unique(routes.target[sends & (replicas[routes.target] < replicas[me])]).tolist()
    elsewhere = (routes.target == me) & (own.is_source | abroad)[routes.source]
    live = np.array([buffer.kind is Kind.LIVE for buffer in target.buffers], dtype=bool)
    group = np.array([buffer.group for buffer in target.buffers], dtype=np.int64)
    faults = [f"{own.members[n].name}: a copy passes on to a replica before this one" for n in wrong_way]
    for passed, come in (
        (sends & ~abroad[routes.target], elsewhere), (sends & abroad[routes.target], routes.target == me)
    ):  # fmt: skip
        parts = own.parts.select(np.unique(routes.part[passed]))
        got = own.parts.select(routes.part[come])
        row, part, wrong = _placed(rows, parts, parts.source_buffer, parts.source_offset, parts.source_strides)
        late = ~live[rows.buffer[row]] | (group[rows.buffer[row]] != parts.group[part])
        never = parts.tensor[_come(rows, parts, row, part, got) != parts.numel]
        for tensors, what in (
            (wrong, "what this target does not have there"),
            (np.unique(parts.tensor[part[late]]).tolist(), "what is not live memory of the receiver's group"),
            (np.unique(never).tolist(), "what nobody sends here before"),
        ):
            faults += [f"{own.tensors[n].name}: a copy passes on {what}" for n in tensors]
    return faults


def _come(rows: Rows, parts: Parts, row: Int64s, part: Int64s, got: Parts) -> Int64s:
    """Of every part, how many elements `got` writes. `row` and `part` say which part lies in which row."""
    here, come_part, _ = _placed(rows, got, got.target_buffer, got.target_offset, got.target_strides)
    left, right = pairs_by_key(row, here)
    left, right = part[left], come_part[right]
    lo, hi, meets = intersect(parts.lo[left], parts.hi[left], got.lo[right], got.hi[right])
    come = np.zeros(len(parts), dtype=np.int64)
    np.add.at(come, left[meets], volume(lo[meets], hi[meets]))
    return come


def _damage(own: Slice) -> str | None:
    """What a decoded slice says that no planner would have."""
    names = [member.name for member in own.members]
    if own.name not in names or len(set(names)) < len(names):
        return "its member is not there, or two have one name"
    if not all(map(refines, own.splits.tolist(), (tensor.shape for tensor in own.tensors))):
        return "a split does not divide its tensor"
    known = all(0 <= number < own.count for number in own.numbers)
    if not len(names) == len(own.numbers) == len(own.scratch_slots) or not known:
        return "members without numbers"
    if any(name not in {tensor.name for tensor in own.tensors} for _, name in own.aliases):
        return "an alias of a tensor that is not there"
    columns: Sequence[tuple[Int64s, int]] = (
        (own.parts.tensor, len(own.tensors)), (own.routes.source, len(names)), (own.routes.target, len(names)),
        (own.routes.part, len(own.parts)), (own.routes.counted, 2),
    )  # fmt: skip
    if any(len(column) and not 0 <= column.min() <= column.max() < limit for column, limit in columns):
        return "a number refers to what is not there"
    for table in (own.parts, own.routes):
        if len({len(getattr(table, f.name)) for f in fields(table)}) != 1:
            return "columns of different lengths"
    split = own.splits[own.parts.tensor]
    if not ((own.parts.lo >= 0) & (own.parts.lo < own.parts.hi) & (own.parts.hi <= split)).all():
        return "a box leaves its tensor"
    return None


def _packed(table: Parts | Routes) -> dict[str, bytes]:
    return {f.name: _pack(getattr(table, f.name)) for f in fields(table)}


def _pack(column: Int64s) -> bytes:
    """Little-endian integers, four bytes wide where they all fit, with the width in front."""
    narrow = int(column.min(initial=0)) >= -(1 << 31) and int(column.max(initial=0)) < 1 << 31
    return (b"\x04" if narrow else b"\x08") + np.ascontiguousarray(column, dtype="<i4" if narrow else "<i8").tobytes()


def _unpack(data: bytes) -> Int64s:
    if data[:1] not in (b"\x04", b"\x08"):
        raise ValueError("a column without a width")
    return np.frombuffer(data[1:], dtype=f"<i{data[0]}").astype(np.int64)
