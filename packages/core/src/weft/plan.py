"""Planning: from the layouts of both sides to all copies, proven to write every element of every target exactly
once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from weft.agreement import agree
from weft.assign import Landing, assign
from weft.copies import Copies, Loops, Parts, Routes, expand, loops_of
from weft.errors import PlanError
from weft.layout import ITEM_BYTES, Layout
from weft.member import Member
from weft.policy import Policy
from weft.rows import Rows
from weft.statistics import Statistics, statistics_of
from weft.table import Int64s, distinct, stable_order

PLANNER_VERSION = 4
"""Grows when equal inputs would give another plan; part of the fingerprint."""
_WORTH_RELAYING = 4
"""What is `auto` in the policy is chosen where it saves at least one in so many bytes."""


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
    aliases: tuple[tuple[str, str], ...]
    """(alias, name) of tensors that a side knows under another name, too."""
    policy: Policy
    splits: Int64s
    """The factors in which the boxes of each tensor are given, padded on the left with ones: shape (tensors, k)."""
    parts: Parts
    routes: Routes
    scratch_slots: Int64s
    """Scratch groups in flight at every member; 0 at those that are no targets. Shape (members,)."""
    egress_bound: int
    """Bytes that the busiest source sends at least in any plan that heeds geometry and the order of locality."""

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
    def loops(self) -> Loops:
        """The parts as loop nests."""
        return loops_of(self.parts, self.splits)

    @cached_property
    def copies(self) -> Copies:
        """All copies, spelled out: some hundred bytes each."""
        return self.copies_at(np.arange(len(self.routes)))

    def copies_at(self, rows: Int64s) -> Copies:
        """The copies of some routes, spelled out."""
        return expand(self.routes, self.parts, self.loops, rows)

    @cached_property
    def item_bytes(self) -> Int64s:
        """Bytes per element of every tensor as it travels (in the target's dtype)."""
        return np.array([ITEM_BYTES[tensor.target_dtype] for tensor in self.tensors], dtype=np.int64)

    @property
    def copy_bytes(self) -> Int64s:
        """Bytes of every copy as they travel."""
        return self._part_bytes[self.routes.part]

    @property
    def _part_bytes(self) -> Int64s:
        return self.parts.numel * self.item_bytes[self.parts.tensor]

    def rows_of(self, member: int) -> Int64s:
        """The routes from or to a member, ascending."""
        target_starts, source_order, source_starts = self._rows
        received = np.arange(target_starts[member], target_starts[member + 1])
        sent = source_order[source_starts[member] : source_starts[member + 1]]
        return np.union1d(received, sent)

    @cached_property
    def _rows(self) -> tuple[Int64s, Int64s, Int64s]:
        routes, numbers = self.routes, np.arange(self.count + 1)
        order = stable_order(routes.source, self.count)
        return np.searchsorted(routes.target, numbers), order, np.searchsorted(routes.source[order], numbers)

    @property
    def count(self) -> int:
        """Number of members."""
        return len(self.members)

    @cached_property
    def most_peers(self) -> int:
        """Most others that one member sends to, or receives from; at least 1."""
        count = self.count
        pairs, _ = distinct(self.routes.source * count + self.routes.target, count * count)
        pairs = pairs[pairs // count != pairs % count]
        most = [np.bincount(ends, minlength=1).max(initial=1) for ends in (pairs // count, pairs % count)]
        return int(max(most))

    @cached_property
    def statistics(self) -> Statistics:
        """Totals and balance."""
        return statistics_of(
            self.members, len(self.tensors), self.parts, self.loops, self.routes, self._part_bytes, self.egress_bound
        )


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

    Raises `PlanError` with every fault of both sides: names, shapes, dtypes, formats, ties, memory claimed twice or by
    nobody, elements that no source holds, plans without copies.
    """
    policy = policy or Policy()
    policy.check()
    everyone = {m.name: msgspec.structs.replace(m, incarnation=0, memory_epoch=0) for m in (*sources, *targets)}
    members = tuple(everyone[name] for name in sorted(everyone))
    # By address, the first member that has the layout: each distinct layout is looked at once.
    held, wanted = (_first_members(members, side) for side in ("source_layout", "target_layout"))
    faults: list[str] = []
    if not held or not wanted:
        counts = [sum(getattr(m, side) is not None for m in members) for side in ("source_layout", "target_layout")]
        faults.append(f"there are {counts[0]} sources and {counts[1]} targets; both are needed")
    source_addresses, target_addresses = sorted(held), sorted(wanted)
    agreement = agree(
        {held[address]: layouts[address] for address in source_addresses},
        {wanted[address]: layouts[address] for address in target_addresses},
        policy,
    )
    faults += agreement.faults
    if faults:
        raise PlanError(faults)
    catalog, joined, found, classes = agreement.catalog, agreement.joined, agreement.found, agreement.classes
    tensors = tuple(map(PlannedTensor, catalog.names, catalog.shapes, catalog.source_dtypes, catalog.target_dtypes))
    landing = _landing([layouts[a] for a in target_addresses], joined.targets)
    item_bytes = np.array([ITEM_BYTES[tensor.target_dtype] for tensor in tensors], dtype=np.int64)
    aliases = tuple(
        (alias, catalog.names[n]) for alias, n in sorted(catalog.index.items()) if alias != catalog.names[n]
    )
    slots = [layouts[m.target_layout].scratch_slots if m.target_layout is not None else 0 for m in members]

    def planned(relay: str, chain: str) -> Plan:
        parts, routes, bound = assign(
            joined, found, classes, members, source_addresses, target_addresses, landing, item_bytes,
            msgspec.structs.replace(policy, relay=relay, chain=chain),
        )  # fmt: skip
        scratch_slots = np.array(slots, dtype=np.int64)
        return Plan(members, tensors, aliases, policy, joined.splits, parts, routes, scratch_slots, bound)

    relay, chain = policy.relay, policy.chain
    chosen = planned("never" if relay == "auto" else relay, "never" if chain == "auto" else chain)
    if relay == "auto":
        between, once = chosen.statistics.cross_host_bytes, chosen.statistics.once_per_host_bytes
        relay = "host" if _worth(between, once) else "never"
        if relay == "host":
            chosen = planned(relay, "never" if chain == "auto" else chain)
    if chain == "auto" and len({m.replica or m.name for m in members if m.is_target}) > 1:
        chained = planned(relay, "always")
        if _is_better(chained.statistics, chosen.statistics):
            chosen = chained
    return chosen


def _worth(before: int, after: int) -> bool:
    return (before - after) * _WORTH_RELAYING >= before > 0


def _is_better(chained: Statistics, direct: Statistics) -> bool:
    """What the busiest member sends or takes bounds a refit; then come the bytes between domains."""
    busiest, before = chained.busiest_bytes, direct.busiest_bytes
    far, far_before = chained.cross_domain_bytes, direct.cross_domain_bytes
    return _worth(before, busiest) or (busiest <= before and _worth(far_before, far))


def _landing(layouts: Sequence[Layout], targets: Rows) -> Landing:
    groups, scratches = [], []
    for layout in layouts:
        scratch = np.full(len(layout.groups), -1, dtype=np.int64)
        scratch[list(layout.scratch_groups)] = np.arange(len(layout.scratch_groups))
        groups.append(np.array([buffer.group for buffer in layout.buffers], dtype=np.int64))
        scratches.append(scratch[groups[-1]])
    first = np.cumsum([0, *(len(each) for each in groups)])
    row = first[targets.layout] + targets.buffer
    return Landing(np.concatenate(groups)[row], np.concatenate(scratches)[row])


def _first_members(members: Sequence[Member], side: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for member in members:
        address = getattr(member, side)
        if address is not None:
            found.setdefault(address, member.name)
    return found
