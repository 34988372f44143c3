"""Planning: from the layouts of both sides to all copies, proven to write every element of every target exactly
once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import msgspec
import numpy as np

from weft.catalog import Catalog, build_catalog, memory_faults, unsupported
from weft.choose import choose_senders
from weft.errors import PlanError
from weft.join import Joined, Overlaps, coverage_faults, join_sides, overlaps
from weft.layout import ITEM_BYTES, Layout
from weft.member import Member
from weft.policy import Policy
from weft.table import (
    Int64s,
    collapse,
    intersect,
    pairs_by_key,
    ragged_ranges,
    row_major_strides,
    subtract,
    unique_rows,
    volume,
)

PLANNER_VERSION = 1
"""Grows when equal inputs would give another plan; part of the fingerprint."""


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """One box moved between two members, in columns of int64; shapes (n,) and, for the axes, (n, k).

    A copy is a loop nest: element `index` of it is at `source_offset + index·source_strides` in the source's buffer, at
    `target_offset + index·target_strides` in the target's, and at `logical_start + index·logical_strides` in the
    flattened tensor.
    """

    source: Int64s
    """Index into `Plan.members`."""
    target: Int64s
    """Index into `Plan.members`."""
    tensor: Int64s
    """Index into `Plan.tensors`."""
    group: Int64s
    """Group of the target's layout."""
    source_buffer: Int64s
    """Index into the source layout's buffers."""
    source_offset: Int64s
    target_buffer: Int64s
    """Index into the target layout's buffers."""
    target_offset: Int64s
    logical_start: Int64s
    counted: Int64s
    """1 where the copy stands for its elements in the digest of its replica: each logical element once."""
    sizes: Int64s
    source_strides: Int64s
    target_strides: Int64s
    logical_strides: Int64s

    def __len__(self) -> int:
        return len(self.source)

    @property
    def numel(self) -> Int64s:
        """Elements per copy."""
        return volume(np.zeros_like(self.sizes), self.sizes)

    def select(self, rows: Int64s) -> Copies:
        """The copies at `rows`, in that order."""
        return Copies(*(getattr(self, column.name)[rows] for column in fields(self)))


class PlannedTensor(msgspec.Struct, frozen=True, array_like=True):
    """A logical tensor that moves."""

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    target_dtype: str


@dataclass(frozen=True, eq=False)
class Plan:
    """All copies of a refit. Immutable, free of addresses and incarnations; equal on every member that computed it."""

    members: tuple[Member, ...]
    """Sorted by name; incarnations and memory epochs zeroed."""
    tensors: tuple[PlannedTensor, ...]
    policy: Policy
    copies: Copies

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the ordered members (name, layouts, host, domain, device, replica), the policy and the
        planner version.
        """
        return fingerprint(self.members, self.policy)

    def index(self, name: str) -> int:
        """Number of a member. Raises `KeyError` for a stranger."""
        return self._numbers[name]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {member.name: n for n, member in enumerate(self.members)}

    @cached_property
    def copy_bytes(self) -> Int64s:
        """Bytes of every copy as they travel (in the target's dtype)."""
        width = np.array([ITEM_BYTES[tensor.target_dtype] for tensor in self.tensors], dtype=np.int64)
        return self.copies.numel * width[self.copies.tensor]

    @cached_property
    def statistics(self) -> Statistics:
        """Totals and balance."""
        copies, size = self.copies, self.copy_bytes
        count = len(self.members)
        egress = np.bincount(copies.source, weights=size, minlength=count).astype(np.int64)
        ingress = np.bincount(copies.target, weights=size, minlength=count).astype(np.int64)
        pairs = np.unique(copies.source * count + copies.target)
        pairs = pairs[pairs // count != pairs % count]
        peers = np.bincount(np.concatenate([pairs // count, pairs % count]), minlength=count)
        sources = np.array([m.is_source for m in self.members])
        mean = egress[sources].mean() if sources.any() else 0.0
        local = int(size[copies.source == copies.target].sum())
        return Statistics(
            bytes=int(size.sum()), local_bytes=local, copies=len(copies), tensors=len(self.tensors),
            egress_bytes={m.name: int(n) for m, n in zip(self.members, egress, strict=True) if m.is_source},
            ingress_bytes={m.name: int(n) for m, n in zip(self.members, ingress, strict=True) if m.is_target},
            egress_max_over_mean=float(egress.max() / mean) if mean else 1.0,
            peers={m.name: int(n) for m, n in zip(self.members, peers, strict=True)},
        )  # fmt: skip


class Statistics(msgspec.Struct, frozen=True):
    """What a plan costs."""

    bytes: int
    """All bytes written into targets."""
    local_bytes: int
    """Those of them that stay within one member."""
    copies: int
    tensors: int
    egress_bytes: dict[str, int]
    """Per source member."""
    ingress_bytes: dict[str, int]
    """Per target member."""
    egress_max_over_mean: float
    """The busiest sender over the mean of all sources; 1.0 is perfect."""
    peers: dict[str, int]
    """Other members each one is connected to."""


def fingerprint(members: Sequence[Member], policy: Policy) -> str:
    """See `Plan.fingerprint`; computable before planning."""
    identity = [
        (m.name, m.source_layout, m.target_layout, m.host, m.domain, m.device, m.replica, m.replica_size)
        for m in sorted(members, key=lambda m: m.name)
    ]
    return hashlib.sha256(msgspec.msgpack.encode((PLANNER_VERSION, identity, policy))).hexdigest()


def plan(
    sources: Sequence[Member], targets: Sequence[Member], layouts: Mapping[str, Layout], policy: Policy | None = None
) -> Plan:
    """Plan the move of everything the targets want from what the sources hold.

    Pure and deterministic: the order of the arguments does not matter, and every member that calls it with equal
    arguments gets an equal plan. A member that is both appears in both sequences. `layouts` maps layout addresses to
    layouts.

    Raises `PlanError` with every fault of both sides: names, shapes, dtypes, ties, memory claimed twice or by
    nobody, elements that no source holds, plans without copies.
    """
    policy = policy or Policy()
    policy.check()
    everyone = {m.name: msgspec.structs.replace(m, incarnation=0, memory_epoch=0) for m in (*sources, *targets)}
    members = tuple(everyone[name] for name in sorted(everyone))
    held = {m.name: layouts[m.source_layout] for m in members if m.source_layout is not None}
    wanted = {m.name: layouts[m.target_layout] for m in members if m.target_layout is not None}
    faults: list[str] = []
    if not held or not wanted:
        faults.append(f"there are {len(held)} sources and {len(wanted)} targets; both are needed")
    checked: set[str] = set()
    for name, layout in wanted.items():
        if layout.address not in checked:
            checked.add(layout.address)
            faults += memory_faults(f"target {name}", layout) + unsupported(f"target {name}", layout, "target")
    for name, layout in held.items():
        faults += unsupported(f"source {name}", layout, "source")
    catalog, mismatches = build_catalog(held, wanted, policy)
    faults += mismatches
    source_layouts = _distinct(held)
    target_layouts = _distinct(wanted)
    joined = join_sides(list(source_layouts.values()), list(target_layouts.values()), catalog)
    found, classes = overlaps(joined)
    someone = {n: next(m for m in wanted if wanted[m].address == a) for n, a in enumerate(target_layouts)}
    faults += coverage_faults(joined, found, someone, catalog)
    if not faults and not len(found.target):
        faults.append("the plan would have no copies: no target wants anything that a source holds")
    if faults:
        raise PlanError(faults)
    copies = _copies(
        joined, found, classes, members, list(source_layouts), list(target_layouts), target_layouts, catalog
    )
    tensors = tuple(
        PlannedTensor(*row)
        for row in zip(catalog.names, catalog.shapes, catalog.source_dtypes, catalog.target_dtypes, strict=True)
    )
    return Plan(members, tensors, policy, copies)


def _distinct(members: Mapping[str, Layout]) -> dict[str, Layout]:
    return {layout.address: layout for layout in sorted(members.values(), key=lambda layout: layout.address)}


def _copies(
    joined: Joined,
    found: Overlaps,
    classes: Int64s,
    members: Sequence[Member],
    source_addresses: list[str],
    target_addresses: list[str],
    target_layouts: Mapping[str, Layout],
    catalog: Catalog,
) -> Copies:
    """Expand overlaps to members, choose senders, and lower boxes to loop nests over buffers."""
    number_of_source = {address: n for n, address in enumerate(source_addresses)}
    number_of_target = {address: n for n, address in enumerate(target_addresses)}
    having: list[list[int]] = [[] for _ in target_addresses]
    holding: list[list[int]] = [[] for _ in source_addresses]
    for m, member in enumerate(members):
        if member.target_layout is not None:
            having[number_of_target[member.target_layout]].append(m)
        if member.source_layout is not None:
            holding[number_of_source[member.source_layout]].append(m)

    # One row per overlap and member that has its target layout, in plan order: target, group, tensor, box.
    counts = np.array([len(h) for h in having], dtype=np.int64)
    starts = np.cumsum(counts) - counts
    layout_of = joined.targets.layout[found.target]
    overlap, position = ragged_ranges(starts[layout_of], counts[layout_of])
    target = np.array([m for h in having for m in h], dtype=np.int64)[position]
    group_of = [np.array([b.group for b in target_layouts[a].buffers], dtype=np.int64) for a in target_addresses]
    row = found.target[overlap]
    lo, hi, box = found.lo[overlap], found.hi[overlap], found.box[overlap]
    row, target, lo, hi, box, counted = _count_once(joined, members, row, target, lo, hi, box)
    targets = joined.targets
    group = np.zeros(len(row), np.int64)
    for n, groups in enumerate(group_of):
        mine = targets.layout[row] == n
        group[mine] = groups[targets.buffer[row[mine]]]
    order = np.lexsort((*lo.T[::-1], targets.tensor[row], group, target))
    row, target, lo, hi, box, counted, group = (c[order] for c in (row, target, lo, hi, box, counted, group))

    holders: list[set[int]] = [set() for _ in range(int(classes.max()) + 1 if len(classes) else 0)]
    source_row: dict[tuple[int, int], int] = {}
    for n, (c, layout) in enumerate(zip(classes.tolist(), joined.sources.layout.tolist(), strict=True)):
        holders[c].update(holding[layout])
        source_row.setdefault((c, layout), n)
    width = np.array([ITEM_BYTES[dtype] for dtype in catalog.target_dtypes], dtype=np.int64)
    nbytes = volume(lo, hi) * width[targets.tensor[row]]
    sender = choose_senders(box, target, nbytes, [tuple(sorted(h)) for h in holders], members)

    layout_of_member = np.array([number_of_source.get(m.source_layout or "", -1) for m in members], dtype=np.int64)
    keys = np.stack([box, layout_of_member[sender]], axis=1)
    first, inverse = unique_rows(keys)
    held = np.array([source_row[(int(c), int(n))] for c, n in keys[first]], dtype=np.int64)[inverse]
    sources = joined.sources
    logical = row_major_strides(joined.factors)[targets.tensor[row]]
    sizes, (from_strides, to_strides, flat_strides) = collapse(
        hi - lo, [sources.strides[held], targets.strides[row], logical]
    )
    return Copies(
        source=sender, target=target, tensor=targets.tensor[row], group=group,
        source_buffer=sources.buffer[held],
        source_offset=sources.offset[held] + ((lo - sources.lo[held]) * sources.strides[held]).sum(axis=1),
        target_buffer=targets.buffer[row],
        target_offset=targets.offset[row] + ((lo - targets.lo[row]) * targets.strides[row]).sum(axis=1),
        logical_start=(lo * logical).sum(axis=1), counted=counted,
        sizes=sizes, source_strides=from_strides, target_strides=to_strides, logical_strides=flat_strides,
    )  # fmt: skip


def _count_once(
    joined: Joined, members: Sequence[Member], row: Int64s, target: Int64s, lo: Int64s, hi: Int64s, box: Int64s
) -> tuple[Int64s, ...]:
    """Mark, in every replica, copies that together hold each logical element once; cut those that overlap in part."""
    replicas = {name: n for n, name in enumerate(sorted({m.replica or m.name for m in members if m.is_target}))}
    replica = np.array([replicas.get(m.replica or m.name, -1) for m in members], dtype=np.int64)[target]
    tensor = joined.targets.tensor[row]
    keys = np.concatenate([replica[:, None], tensor[:, None], lo, hi], axis=1)
    order = np.lexsort((np.arange(len(row)), target))
    first, _ = unique_rows(keys[order])
    counted = np.zeros(len(row), np.int64)
    counted[order[first]] = 1
    # Different boxes of one tensor in one replica that overlap in part: rare, so found in bulk and cut one by one.
    chosen = np.flatnonzero(counted)
    place = replica[chosen] * (int(tensor.max(initial=0)) + 1) + tensor[chosen]
    left, right = pairs_by_key(place, place)
    left, right = chosen[left[left < right]], chosen[right[left < right]]
    _, _, meets = intersect(lo[left], hi[left], lo[right], hi[right])
    clashing = np.unique(np.concatenate([left[meets], right[meets]]))
    if not len(clashing):
        return row, target, lo, hi, box, counted
    taken: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    out: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = []
    for n in clashing.tolist():
        others = taken.setdefault((int(replica[n]), int(tensor[n])), [])
        whole = (tuple(lo[n].tolist()), tuple(hi[n].tolist()))
        fresh = [whole]
        for low, high in others:
            fresh = subtract(fresh, low, high)
        stale = [whole]
        for low, high in fresh:
            stale = subtract(stale, low, high)
        others += fresh
        out += [(n, low, high, 1) for low, high in fresh] + [(n, low, high, 0) for low, high in stale]
    keep = np.setdiff1d(np.arange(len(row)), clashing)
    extra = np.array([part[0] for part in out], dtype=np.int64)
    where = np.concatenate([keep, extra])
    low = np.concatenate([lo[keep], np.array([part[1] for part in out], dtype=np.int64)])
    high = np.concatenate([hi[keep], np.array([part[2] for part in out], dtype=np.int64)])
    flags = np.concatenate([counted[keep], np.array([part[3] for part in out], dtype=np.int64)])
    return row[where], target[where], low, high, box[where], flags
