"""Joining: which part of which source piece feeds which part of which target piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from weft.box import Box
from weft.catalog import Catalog
from weft.layout import Layout
from weft.rows import Rows, common_splits, in_splits, pieces_of
from weft.table import (
    Int64s,
    intersect,
    meeting,
    pairs_by_key,
    subtract,
    unique_rows,
    volume,
)


@dataclass(frozen=True, slots=True)
class Joined:
    """Both sides in one coordinate system."""

    rows: Rows
    """Of the sources, and behind them of the targets, whose layouts count on."""
    sources: Rows
    targets: Rows
    splits: Int64s
    """The common split of every tensor, padded on the left with ones: shape (tensors, k)."""


def join_sides(sources: Sequence[Layout], targets: Sequence[Layout], catalog: Catalog) -> Joined:
    """Bring every piece of both sides into the coarsest split of its tensor that suits all of them."""
    pieces = pieces_of((*sources, *targets), catalog.index)
    splits = common_splits(pieces, catalog.shapes)
    rows = in_splits(pieces, splits)
    border = int(np.searchsorted(rows.layout, len(sources)))
    held, wanted = rows.select(slice(border)), rows.select(slice(border, None))
    return Joined(rows, held, replace(wanted, layout=wanted.layout - len(sources)), splits)


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Intersections of distinct source boxes with target rows: each target element in exactly one of them."""

    target: Int64s
    """Row in `Joined.targets`."""
    box: Int64s
    """Class of equal source boxes."""
    lo: Int64s
    hi: Int64s

    def select(self, rows: Int64s) -> Overlaps:
        """The overlaps at `rows`, in that order."""
        return Overlaps(self.target[rows], self.box[rows], self.lo[rows], self.hi[rows])

    def extend(self, rows: Int64s, ranges: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Overlaps:
        """With more behind them: parts lo:hi of the overlaps at `rows`."""
        lo, hi = (
            np.array([each[end] for each in ranges], dtype=np.int64).reshape(-1, self.lo.shape[1]) for end in (0, 1)
        )
        return Overlaps(
            np.concatenate([self.target, self.target[rows]]), np.concatenate([self.box, self.box[rows]]),
            np.concatenate([self.lo, lo]), np.concatenate([self.hi, hi]),
        )  # fmt: skip


def overlaps(joined: Joined) -> tuple[Overlaps, Int64s]:
    """Intersect every target row with the distinct source boxes of its tensor.

    Where distinct source boxes overlap, an element comes from the first that has it (trap 8). Returns the overlaps,
    and for every source row the class of its box.
    """
    sources, targets = joined.sources, joined.targets
    first, classes = unique_rows(sources.boxes())
    left, right = pairs_by_key(targets.tensor, sources.tensor[first])
    source = first[right]
    lo, hi, meets = intersect(targets.lo[left], targets.hi[left], sources.lo[source], sources.hi[source])
    left, right, lo, hi = left[meets], right[meets], lo[meets], hi[meets]
    doubled = np.zeros(len(targets.tensor), dtype=bool)
    doubled[left[meeting(left, lo, hi)[0]]] = True
    if doubled.any():
        left, right, lo, hi = _first_holder(left, right, lo, hi, doubled)
    return Overlaps(left, right, lo, hi), classes


def _first_holder(
    left: Int64s, right: Int64s, lo: Int64s, hi: Int64s, doubled: npt.NDArray[np.bool_]
) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Cut overlapping intersections so that they become disjoint; bigger ones first, so that few pieces result."""
    plain = ~doubled[left]
    out: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = []
    for target in np.flatnonzero(doubled).tolist():
        rows = np.flatnonzero(left == target)
        elements = volume(lo[rows], hi[rows])
        taken: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for row in rows[np.lexsort((right[rows], -elements))].tolist():
            parts = [(tuple(lo[row].tolist()), tuple(hi[row].tolist()))]
            for low, high in taken:
                parts = subtract(parts, low, high)
            taken += parts
            out += [(target, int(right[row]), low, high) for low, high in parts]
    extra = [np.array([row[c] for row in out], dtype=np.int64) for c in (0, 1)]
    lows, highs = (np.array([row[c] for row in out], dtype=np.int64).reshape(len(out), lo.shape[1]) for c in (2, 3))
    merged = [
        np.concatenate([column[plain], more])
        for column, more in ((left, extra[0]), (right, extra[1]), (lo, lows), (hi, highs))
    ]
    order = np.argsort(merged[0], kind="stable")
    return merged[0][order], merged[1][order], merged[2][order], merged[3][order]


def coverage_faults(joined: Joined, found: Overlaps, names: Mapping[int, str], catalog: Catalog) -> list[str]:
    """Prove that the overlaps write every element of every target row exactly once; name the boxes where they do not.

    `names` maps the number of a target layout to a member that has it.
    """
    targets = joined.targets
    written = np.zeros(len(targets.tensor), np.int64)
    np.add.at(written, found.target, volume(found.lo, found.hi))
    faults: list[str] = []
    for row in np.flatnonzero(written < targets.numel).tolist():
        missing = [(tuple(targets.lo[row].tolist()), tuple(targets.hi[row].tolist()))]
        for n in np.flatnonzero(found.target == row).tolist():
            missing = subtract(missing, tuple(found.lo[n].tolist()), tuple(found.hi[n].tolist()))
        split = tuple(joined.splits[targets.tensor[row]].tolist())
        boxes = ", ".join(str(Box(split, low, high)) for low, high in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        member = names[int(targets.layout[row])]
        faults.append(f"{catalog.names[targets.tensor[row]]}: target {member} wants {boxes}{more}, held by no source")
    twice, _ = meeting(found.target, found.lo, found.hi)
    for n in np.unique(found.target[twice]).tolist():
        member = names[int(targets.layout[n])]
        faults.append(f"{catalog.names[targets.tensor[n]]}: elements of target {member} would be written twice")
    return faults
