"""Where each box of a tensor comes from, and why that member sends it. No output here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache

import msgspec
import numpy as np

from weft.box import Affine, Box, boxes_from_views, common_factors, cuts_of, refine
from weft.copies import Copies
from weft.errors import ConfigError
from weft.holders import locality
from weft.layout import Layout
from weft.plan import Plan

DISTANCES = ("same process", "same device", "same host", "same fabric domain", "another fabric domain")
"""By `weft.holders.locality`."""
_FROM_A_MODEL = "give --model, --source and --target to have them computed again"
_NUMBER = re.compile(r"\d+")


class Origin(msgspec.Struct, frozen=True):
    """One box in one target, and who sends it."""

    box: str
    """Half-open ranges of the logical tensor, per axis or per factor of a split."""
    nbytes: int
    """As they travel."""
    target: str
    target_buffer: str
    """Its name, or, where only a plan file is known, `#` and its number in the layout."""
    target_offset: int
    """First element in the buffer."""
    source: str
    source_buffer: str
    source_offset: int
    distance: str
    """One of `DISTANCES`: how near the sender is to the target."""
    relayed: bool
    """Whether the sender is a target that passes on what it received."""
    chained: bool
    """Whether it does so to another replica."""
    holders: int | None
    """Sources that hold the whole box; None where only a plan file is known."""
    nearest_holders: int | None
    """Those of them that are as near to the target as the sender: among them bytes are balanced."""
    share: float | None
    """Bytes of the whole plan that the sender sends, over those that all the nearest holders send."""


class Explanation(msgspec.Struct, frozen=True):
    """A tensor's way from sources to targets."""

    tensor: str
    shape: tuple[int, ...]
    source_dtype: str
    target_dtype: str
    fingerprint: str
    origins: list[Origin]
    """By target in plan order."""
    unknown: list[str]
    """What cannot be said without the layouts."""


def explain(plan: Plan, name: str, rank: str | None = None, layouts: Mapping[str, Layout] | None = None) -> Explanation:
    """Look a tensor up in a plan.

    `rank` names a target, or counts the targets in order of their names (numbers in names count as numbers).
    `layouts` are all layouts of the plan's members by address; without them, buffers have numbers and holders are
    unknown. Raises `ConfigError` for names that the plan does not have, with the nearest ones it has, and for layouts
    that are not the plan's.
    """
    if layouts is not None:
        _check_layouts(plan, layouts)
    names = {tensor.name: number for number, tensor in enumerate(plan.tensors)}
    aliases = dict(plan.aliases)
    known = aliases.get(name, name)
    if known not in names:
        raise ConfigError(f"the plan moves no tensor {name!r}; {_nearest(name, [*names, *aliases])}")
    tensor = plan.tensors[names[known]]
    chosen = plan.parts.tensor[plan.routes.part] == names[known]
    if rank is not None:
        chosen &= plan.routes.target == _target(plan, rank)
    copies = plan.copies_at(np.flatnonzero(chosen))
    held = _held_boxes(plan, {known} | {a for a, n in aliases.items() if n == known}, layouts) if layouts else None
    nbytes = plan.copy_bytes[chosen].tolist()
    return Explanation(
        tensor=known,
        shape=tensor.shape,
        source_dtype=tensor.source_dtype,
        target_dtype=tensor.target_dtype,
        fingerprint=plan.fingerprint,
        origins=_origins(plan, tensor.shape, copies, nbytes, layouts, held),
        unknown=[] if layouts else [
            f"names of buffers, which a plan file numbers: {_FROM_A_MODEL}",
            f"how many sources hold a box, and the sender's share among the nearest: {_FROM_A_MODEL}",
        ],
    )  # fmt: skip


def _check_layouts(plan: Plan, layouts: Mapping[str, Layout]) -> None:
    needed = {a for m in plan.members for a in (m.source_layout, m.target_layout) if a is not None}
    if needed - layouts.keys():
        raise ConfigError(
            f"the plan was made for other layouts: {len(needed - layouts.keys())} of its {len(needed)} are not among "
            "those of this --model, --source and --target; give what it was made with, its dtypes included"
        )


def _target(plan: Plan, rank: str) -> int:
    targets = {member.name: n for n, member in enumerate(plan.members) if member.is_target}
    ordered = sorted(targets, key=lambda name: [(int(n or 0), text) for n, text in re.findall(r"(\d*)(\D*)", name)])
    if rank in targets:
        return targets[rank]
    if rank.isdecimal() and int(rank) < len(ordered):
        return targets[ordered[int(rank)]]
    raise ConfigError(
        f"rank {rank!r} is no target of the plan; expected 0 to {len(ordered) - 1}, or a name; "
        f"{_nearest(rank, ordered)}"
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    """The names nearest to `name`: first by their words, then by the numbers in them."""
    patterns: dict[str, list[str]] = {}
    for other in names:
        patterns.setdefault(_NUMBER.sub("#", other), []).append(other)
    close = difflib.get_close_matches(_NUMBER.sub("#", name), patterns, n=3) or sorted(patterns)[:3]
    numbers = [int(n) for n in _NUMBER.findall(name)]

    def apart(other: str) -> int:
        found = map(int, _NUMBER.findall(other))
        return sum(abs(a - b) for a, b in zip(numbers, found, strict=False))

    return f"the nearest are {', '.join(min(patterns[pattern], key=apart) for pattern in close)}"


def _origins(
    plan: Plan,
    shape: tuple[int, ...],
    copies: Copies,
    nbytes: list[int],
    layouts: Mapping[str, Layout] | None,
    held: list[tuple[list[int], list[Box]]] | None,
) -> list[Origin]:
    egress = plan.statistics.egress_bytes

    @cache
    def boxes(logical: Affine) -> tuple[str, tuple[int, ...]]:
        placed = [box for box, _, _ in boxes_from_views(shape, logical, logical)]
        words = " and ".join(_words(box, shape) for box in placed)
        return words, tuple(_holders(placed, shape, held)) if held else ()

    def buffer(address: str | None, number: int) -> str:
        return layouts[address or ""].buffers[number].name if layouts else f"#{number}"

    origins = []
    for n in range(len(copies)):
        source, target = plan.members[copies.source[n]], plan.members[copies.target[n]]
        logical = Affine(
            int(copies.logical_start[n]), tuple(copies.sizes[n].tolist()), tuple(copies.logical_strides[n].tolist())
        )
        words, holders = boxes(logical)
        distance = locality(source, target)
        equal = [m.name for m in (plan.members[h] for h in holders) if locality(m, target) == distance]
        sent = sum(egress[name] for name in equal)
        origins.append(
            Origin(
                box=words,
                nbytes=nbytes[n],
                target=target.name,
                target_buffer=buffer(target.target_layout, int(copies.target_buffer[n])),
                target_offset=int(copies.target_offset[n]),
                source=source.name,
                source_buffer=buffer(source.sends_from, int(copies.source_buffer[n])),
                source_offset=int(copies.source_offset[n]),
                distance=DISTANCES[distance],
                relayed=not source.is_source,
                chained=not source.is_source and source.replica != target.replica,
                holders=len(holders) if held else None,
                nearest_holders=len(equal) if held else None,
                share=egress[source.name] / sent if sent and source.is_source else None,
            )
        )
    return origins


def _words(box: Box, shape: tuple[int, ...]) -> str:
    ranges = ", ".join(f"{low}:{high}" for low, high in zip(box.lo, box.hi, strict=True))
    return f"[{ranges}]" if box.factors == shape else f"[{ranges}] of {box.factors}"


def _held_boxes(plan: Plan, names: set[str], layouts: Mapping[str, Layout]) -> list[tuple[list[int], list[Box]]]:
    """Per distinct source layout that holds any of a tensor: the members that have it, and its boxes of the tensor."""
    members: dict[str, list[int]] = {}
    for n, member in enumerate(plan.members):
        if member.source_layout is not None:
            members.setdefault(member.source_layout, []).append(n)
    found = []
    for address, numbers in members.items():
        layout = layouts[address]
        wanted = [n for n, tensor in enumerate(layout.tensors) if tensor.name in names]
        table = layout.pieces
        rows = np.flatnonzero(np.isin(table.tensor, wanted))
        boxes = [Box(*(tuple(column[n].tolist()) for column in (table.factors, table.lo, table.hi))) for n in rows]
        if boxes:
            found.append((numbers, boxes))
    return found


def _holders(boxes: list[Box], shape: tuple[int, ...], held: list[tuple[list[int], list[Box]]]) -> list[int]:
    """Members whose own boxes contain every one of `boxes`."""
    splits = {box.factors for box in (*boxes, *(each for _, owned in held for each in owned))}
    factors = common_factors(shape, {cut for split in splits for cut in cuts_of(split)})

    def parts(box: Box) -> list[Box]:
        return [part for part, _, _ in refine(box, 0, (0,) * len(box.factors), factors)]

    wanted = [part for box in boxes for part in parts(box)]
    holders = []
    for members, owned in held:
        outers = [part for box in owned for part in parts(box)]
        if all(any(_contains(outer, inner) for outer in outers) for inner in wanted):
            holders += members
    return sorted(holders)


def _contains(outer: Box, inner: Box) -> bool:
    return all(a <= c and d <= b for a, b, c, d in zip(outer.lo, outer.hi, inner.lo, inner.hi, strict=True))
