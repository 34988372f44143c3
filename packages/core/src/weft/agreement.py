"""Whether two sides fit together: every fault at once, before anything is planned or a candidate is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weft.catalog import Catalog, build_catalog, memory_faults, unsupported
from weft.formats import CHECKPOINT, Format, refusal
from weft.join import Joined, Overlaps, coverage_faults, join_sides, overlaps
from weft.layout import Layout
from weft.policy import Policy
from weft.table import Int64s


@dataclass(frozen=True, slots=True)
class Agreement:
    """Both sides in one catalog and one coordinate system, and all that keeps them from fitting together."""

    catalog: Catalog
    joined: Joined
    """Layouts of either side are numbered in the order in which they were given."""
    found: Overlaps
    classes: Int64s
    """For every source row the class of its box; see `weft.join.overlaps`."""
    faults: tuple[str, ...]


def agree(held: Mapping[str, Layout], wanted: Mapping[str, Layout], policy: Policy) -> Agreement:
    """Hold two sides against each other; each maps a member's name to its layout, of equal layouts one is enough.

    Finds names on one side only, shapes, dtypes, formats, ties, memory claimed twice or by nobody, elements that no
    source holds.
    """
    faults: list[str] = []
    by_name = {name: held[name] for name in sorted(held)}, {name: wanted[name] for name in sorted(wanted)}
    for name, layout in by_name[1].items():
        faults += memory_faults(f"target {name}", layout) + unsupported(f"target {name}", layout, "target")
    for name, layout in by_name[0].items():
        faults += unsupported(f"source {name}", layout, "source")
    catalog, mismatches = build_catalog(*by_name, policy)
    faults += mismatches + _format_faults(*by_name, catalog)
    joined = join_sides(list(held.values()), list(wanted.values()), catalog)
    found, classes = overlaps(joined)
    faults += coverage_faults(joined, found, dict(enumerate(wanted)), catalog)
    if not faults and not len(found.target):
        faults.append("the plan would have no copies: no target wants anything that a source holds")
    return Agreement(catalog, joined, found, classes, tuple(faults))


def acceptable(offered: Mapping[str, Layout | None], wanted: Layout, policy: Policy | None = None) -> list[str]:
    """Why a candidate cannot feed a target; empty when it can.

    `offered` has the layout of each of the candidate's members by name, None where one is not known: a candidate is
    taken whole or not at all. The faults are those that a plan of the two would raise, all of them.
    """
    faults = [f"{name}: without a layout" for name, layout in offered.items() if layout is None]
    held = {name: layout for name, layout in offered.items() if layout is not None}
    if not held:
        return faults or ["nobody offers anything"]
    return [*faults, *agree(held, {"here": wanted}, policy or Policy()).faults]


def _format_faults(held: Mapping[str, Layout], wanted: Mapping[str, Layout], catalog: Catalog) -> list[str]:
    """Tensors that are held in two formats, or in one that a target does not accept."""
    if not any(layout.formats for layout in (*held.values(), *wanted.values())):
        return []  # of a hundred thousand tensors, as a rule
    faults: list[str] = []
    first: dict[str, tuple[str, Format]] = {}
    for member, layout in held.items():
        for name, found in _formats(layout, catalog):
            known, other = first.setdefault(name, (member, found))
            if found != other:
                faults.append(f"{name}: source {known} holds it in format {other}, source {member} in {found}")
    for member, layout in wanted.items():
        for name, own in _formats(layout, catalog):
            if name in first and (why := refusal(first[name][1], own, layout.accepts)):
                faults.append(
                    f"{name}: source {first[name][0]} holds it in format {first[name][1]}, which target {member} does "
                    f"not accept ({why})"
                )
    return faults


def _formats(layout: Layout, catalog: Catalog) -> Iterator[tuple[str, Format]]:
    """The format of every tensor that moves, by the name it has in the catalog."""
    for tensor in layout.tensors:
        if tensor.name in catalog.index:
            yield catalog.names[catalog.index[tensor.name]], layout.formats.get(tensor.name, CHECKPOINT)
