"""The catalog: every logical tensor of a job under one name, and every fault between the two sides."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import numpy.typing as npt

from weft.box import Affine, Box, boxes_from_views
from weft.errors import LayoutError
from weft.layout import Kind, Layout, LogicalTensor
from weft.policy import Policy
from weft.table import Int64s, collapse, intersect, ragged_ranges, subtract


@dataclass(frozen=True, slots=True)
class Catalog:
    """Logical tensors that move, by index; aliases are resolved."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    source_dtypes: tuple[str, ...]
    target_dtypes: tuple[str, ...]
    index: Mapping[str, int]
    """Every name in use, aliases included; ignored source tensors are absent."""


@dataclass(frozen=True)
class _Side:
    """What the members of one side declare."""

    names: dict[str, Sequence[str]]
    """Per member, the names of its tensors, aliases resolved."""
    tensors: Mapping[str, LogicalTensor]
    """By name, as the first member has it."""

    @cached_property
    def first(self) -> dict[str, str]:
        """By name, the first member that has it."""
        return {name: member for member in reversed(self.names) for name in self.names[member]}


def _declared(
    label: str, members: Mapping[str, Layout], aliases: Mapping[str, str], policy: Policy, faults: list[str]
) -> _Side:
    """Collect the tensors of one side; members that contradict each other are faults."""
    names: dict[str, Sequence[str]] = {}
    seen: dict[str, LogicalTensor] = {}
    unlike: list[tuple[str, Sequence[LogicalTensor], list[LogicalTensor]]] = []
    for member, layout in members.items():
        tensors: Sequence[LogicalTensor] = layout.tensors
        if policy.only:
            tensors = [tensor for tensor in tensors if policy.moves(aliases.get(tensor.name, tensor.name))]
        names[member] = [tensor.name for tensor in tensors]
        if aliases:
            names[member] = [aliases.get(name, name) for name in names[member]]
        known = list(map(seen.setdefault, names[member], tensors))
        if known != list(tensors):  # in bulk: there may be a hundred thousand
            unlike.append((member, tensors, known))
    side = _Side(names, seen)
    faults += [
        f"{tensor.name}: {label} {side.first[name]} has {first.dtype}{list(first.shape)}, "
        f"{label} {member} has {tensor.dtype}{list(tensor.shape)}"
        for member, tensors, known in unlike
        for name, tensor, first in zip(names[member], tensors, known, strict=True)
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype)
    ]
    return side


def build_catalog(
    sources: Mapping[str, Layout], targets: Mapping[str, Layout], policy: Policy
) -> tuple[Catalog, list[str]]:
    """Match the logical tensors of both sides. `sources` and `targets` map a member's name to its layout; of members
    with equal layouts, one is enough.

    Returns the catalog and every fault found: names on one side only, shapes, dtypes, ties.
    """
    faults: list[str] = []
    aliases = _aliases(sources, targets, faults)
    held, wanted = (
        _declared(label, members, aliases, policy, faults)
        for label, members in (("source", sources), ("target", targets))
    )
    faults += [
        f"{name}: wanted by target {wanted.first[name]}, held by no source (map the name, or skip it at the target)"
        for name in sorted(wanted.tensors.keys() - held.tensors.keys())
    ]
    faults += [
        f"{name}: held by source {held.first[name]}, wanted by no target (list it in Policy.ignore if that is meant)"
        for name in sorted(held.tensors.keys() - wanted.tensors.keys())
        if not policy.ignores(name)
    ]
    names = sorted(held.tensors.keys() & wanted.tensors.keys())
    ours, theirs = ([side.tensors[name] for name in names] for side in (held, wanted))
    differing = zip(names, ours, theirs, strict=True) if ours != theirs else ()
    for name, tensor, other in differing:
        if tensor.shape != other.shape:
            faults.append(
                f"{name}: source {held.first[name]} has shape {list(tensor.shape)}, "
                f"target {wanted.first[name]} {list(other.shape)}"
            )
        if tensor.dtype != other.dtype and (tensor.dtype, other.dtype) not in policy.casts:
            faults.append(
                f"{name}: source {held.first[name]} holds {tensor.dtype}, target {wanted.first[name]} wants "
                f'{other.dtype}; declare it with Policy(casts=(("{tensor.dtype}", "{other.dtype}"),)) if rounding is '
                "meant"
            )
    index = dict(zip(names, range(len(names)), strict=True))
    faults += [
        f"Policy.only: {pattern!r} is the name of no tensor that a source holds and a target wants"
        for pattern in policy.only
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names)
    ]
    index.update({alias: index[name] for alias, name in aliases.items() if name in index})
    shapes, dtypes, other_dtypes = (
        tuple(each.shape for each in ours), tuple(each.dtype for each in ours), tuple(each.dtype for each in theirs)
    )  # fmt: skip
    catalog = Catalog(tuple(names), shapes, dtypes, other_dtypes, index)
    if policy.only:
        faults += [fault for member, layout in targets.items() for fault in _torn_groups(member, layout, index)]
    return catalog, faults


def _torn_groups(member: str, layout: Layout, index: Mapping[str, int]) -> list[str]:
    """Scratch groups of which only a part would move: what lands together must arrive together."""
    scratch = {n for n, buffer in enumerate(layout.buffers) if buffer.kind is Kind.SCRATCH}
    tensors: dict[int, set[str]] = defaultdict(set)
    for tensor, buffer in zip(layout.pieces.tensor.tolist(), layout.pieces.buffer.tolist(), strict=True):
        if buffer in scratch:
            tensors[layout.buffers[buffer].group].add(layout.tensors[tensor].name)
    return [
        f"target {member}: group {layout.groups[group]} lands as a whole: Policy.only leaves out "
        f"{', '.join(sorted(names - index.keys()))}"
        for group, names in sorted(tensors.items())
        if names & index.keys() and names - index.keys()
    ]


def _aliases(sources: Mapping[str, Layout], targets: Mapping[str, Layout], faults: list[str]) -> dict[str, str]:
    """alias → name over both sides. A target's tie onto tensors that a source holds untied is a fault."""
    aliases: dict[str, str] = {}
    tied_by_source: set[str] = set()
    for label, members in (("source", sources), ("target", targets)):
        for member, layout in members.items():
            for tie in layout.ties:
                if aliases.setdefault(tie.alias, tie.name) != tie.name:
                    faults.append(f"{tie.alias}: tied to {aliases[tie.alias]} and, by {label} {member}, to {tie.name}")
                if label == "source":
                    tied_by_source.add(tie.alias)
    for alias, name in aliases.items():
        if name in aliases:
            faults.append(f"{alias}: tied to {name}, which is itself tied to {aliases[name]}; name the tensor on disk")
        holders = [member for member, layout in sources.items() if any(t.name == alias for t in layout.tensors)]
        if holders:
            who = "some sources" if alias in tied_by_source else "targets"
            faults.append(f"{alias}: {who} tie it to {name}, source {holders[0]} holds it as a tensor of its own")
    return aliases


def memory_faults(member: str, layout: Layout) -> list[str]:
    """Faults in a target's memory: elements that two pieces write, or that neither piece nor fill claims (traps 12,
    13, 69).
    """
    faults: list[str] = []
    views: dict[int, list[tuple[str, Affine]]] = defaultdict(list)
    filled = {fill.buffer for fill in layout.fills}
    numbers = {buffer.name: n for n, buffer in enumerate(layout.buffers) if buffer.name in filled}
    table, tiled = layout.pieces, _tiled(layout, [numbers[fill.buffer] for fill in layout.fills])
    sizes = table.hi - table.lo
    for n in np.flatnonzero(~tiled[table.buffer]).tolist():
        view = Affine(int(table.offset[n]), tuple(map(int, sizes[n])), tuple(map(int, table.strides[n])))
        views[int(table.buffer[n])].append((layout.tensors[table.tensor[n]].name, view))
    for fill in layout.fills:
        views[numbers[fill.buffer]].append(("a fill", Affine(fill.offset, fill.sizes, fill.strides)))
    for number in np.flatnonzero(~tiled).tolist():
        buffer = layout.buffers[number]
        where = f"{member}: buffer {buffer.name} ({buffer.numel} elements)"
        faults += [f"{where}: {text}" for text in _claim_faults(buffer.numel, views.get(number, []))]
    return faults


def _tiled(layout: Layout, filled: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which buffers consist of dense pieces, end to end, and nothing else: nearly all of them, so they go in bulk.

    `filled` are the numbers of buffers that have fills.
    """
    table = layout.pieces
    sizes, (strides,) = collapse(table.hi - table.lo, [table.strides])
    dense = (strides[:, -1] == 1) | (sizes[:, -1] == 1) if sizes.shape[1] else np.ones(len(table), dtype=bool)
    dense &= (sizes[:, :-1] == 1).all(axis=1)
    order = np.lexsort((table.offset, table.buffer))
    buffer, first = table.buffer[order], table.offset[order]
    end = first + table.numel[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = buffer[1:] != buffer[:-1]
    ends = np.roll(begins, -1)
    numel = np.array([each.numel for each in layout.buffers], dtype=np.int64)
    joins = np.where(begins, first == 0, first == np.roll(end, 1)) & (~ends | (end == numel[buffer])) & dense[order]
    tiled = np.zeros(len(numel), dtype=bool)
    tiled[buffer] = True
    tiled[buffer[~joins]] = False
    tiled[filled] = False
    return tiled


def _claim_faults(numel: int, claims: Sequence[tuple[str, Affine]]) -> list[str]:
    """Say which claims on one buffer share elements, and how many elements are claimed by none."""
    if numel and not claims:
        return ["no piece and no fill claims any of it"]
    cuts = {
        stride
        for _, view in claims
        for stride, size in zip(view.strides, view.sizes, strict=True)
        if size > 1 and stride > 0
    }
    owners: list[str] = []
    boxes: list[Box] = []
    for label, view in claims:
        try:
            placed = [box for box, _, _ in boxes_from_views((numel,), view, view, cuts)]
        except LayoutError:
            return [f"{label} writes some elements twice ({view})"]
        owners += [label] * len(placed)
        boxes += placed
    faults: list[str] = []
    claimed = sum(box.numel for box in boxes)
    clashes = _clashes(boxes)
    if clashes:
        names = {tuple(sorted((owners[a], owners[b]))) for a, b in clashes}
        faults += [f"{first} and {second} share memory" for first, second in sorted(names)]
        left = [((0,) * len(boxes[0].factors), boxes[0].factors)]
        for box in boxes:
            left = subtract(left, box.lo, box.hi)
        claimed = numel - sum(Box(boxes[0].factors, lo, hi).numel for lo, hi in left)
    if claimed < numel:
        faults.append(f"{numel - claimed} are claimed by none")
    return faults


def _clashes(boxes: Sequence[Box]) -> list[tuple[int, int]]:
    """Pairs of boxes of one split that meet."""
    if len(boxes) < 2:
        return []
    if not boxes[0].factors:  # of one element: all of them are the same
        return list(combinations(range(len(boxes)), 2))
    lo, hi = (np.array(ends, dtype=np.int64) for ends in ([b.lo for b in boxes], [b.hi for b in boxes]))
    order = np.argsort(lo[:, 0], kind="stable")
    left, right = _neighbours(lo[order, 0], hi[order, 0])
    left, right = order[left], order[right]
    _, _, meets = intersect(lo[left], hi[left], lo[right], hi[right])
    return list(zip(left[meets].tolist(), right[meets].tolist(), strict=True))


def _neighbours(lo: Int64s, hi: Int64s) -> tuple[Int64s, Int64s]:
    """Pairs whose outermost ranges meet, for ranges sorted by `lo`."""
    firsts = np.arange(1, len(lo) + 1, dtype=np.int64)
    return ragged_ranges(firsts, np.maximum(np.searchsorted(lo, hi, side="left") - firsts, 0))


def unsupported(member: str, layout: Layout, role: str) -> list[str]:
    """What has its place in a layout but cannot be moved yet."""
    produced = [buffer.name for buffer in layout.buffers if buffer.kind is Kind.PRODUCED]
    if produced and role == "source":
        return [f"{member}: produced buffers are not built yet ({produced[0]} and {len(produced) - 1} more)"]
    if produced:
        return [f"{member}: a target cannot have produced buffers ({produced[0]})"]
    if role == "source" and any(buffer.kind is Kind.SCRATCH for buffer in layout.buffers):
        return [f"{member}: a source cannot have scratch buffers"]
    return []
