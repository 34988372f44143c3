"""Vectorised steps over tables of boxes. Every column is int64; ragged joins are expanded by repetition, never by
loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
_LONGEST_TABLE = 8
"""Entries per key."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of integers, end to end."""

    starts: Int64s
    """Where each list begins in `values`."""
    sizes: Int64s
    values: Int64s

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def of(cls, lists: Sequence[Int64s]) -> Ragged:
        """From the lists."""
        sizes = np.array([len(each) for each in lists], dtype=np.int64)
        values = np.concatenate(lists) if lists else np.zeros(0, np.int64)
        return cls(np.cumsum(sizes) - sizes, sizes, values)

    @classmethod
    def by_key(cls, keys: Int64s, values: Int64s, count: int) -> Ragged:
        """`count` lists; list k holds the values whose key is k. `keys` ascend."""
        sizes = np.bincount(keys, minlength=count).astype(np.int64)
        return cls(np.cumsum(sizes) - sizes, sizes, values)

    def row(self, n: int) -> Int64s:
        """List n."""
        return self.values[self.starts[n] : self.starts[n] + self.sizes[n]]

    def rows(self) -> Int64s:
        """For every value, the number of its list."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.sizes)


def ragged_classes(lists: Ragged) -> tuple[Int64s, Ragged]:
    """(number of each list's class, the distinct lists), shorter ones first, then in lexicographic order."""
    number = np.zeros(len(lists), dtype=np.int64)
    distinct: list[Int64s] = []
    for size in np.unique(lists.sizes).tolist():
        rows = np.flatnonzero(lists.sizes == size)
        table = lists.values[lists.starts[rows, None] + np.arange(size)]
        first, classes = unique_rows(table)
        number[rows] = len(distinct) + classes
        distinct += list(table[first])
    return number, Ragged.of(distinct)


def ragged_ranges(starts: Int64s, counts: Int64s) -> tuple[Int64s, Int64s]:
    """Concatenate `range(starts[i], starts[i] + counts[i])`; returns (owner i of each entry, the entries)."""
    owner = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(len(owner), dtype=np.int64) + (starts - first)[owner]


def pairs_by_key(left: Int64s, right: Int64s) -> tuple[Int64s, Int64s]:
    """Every (i, j) with `left[i] == right[j]`, ordered by i, then by j's place in a stable sort of `right`."""
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    starts = np.searchsorted(ordered, left, side="left")
    counts = np.searchsorted(ordered, left, side="right") - starts
    owner, positions = ragged_ranges(starts, counts)
    return owner, order[positions]


def intersect(
    lo: Int64s, hi: Int64s, other_lo: Int64s, other_hi: Int64s
) -> tuple[Int64s, Int64s, npt.NDArray[np.bool_]]:
    """Row-wise intersection of boxes of shape (n, k); returns lo, hi and whether it is not empty."""
    low, high = np.maximum(lo, other_lo), np.minimum(hi, other_hi)
    meets: npt.NDArray[np.bool_] = np.all(low < high, axis=1)
    return low, high, meets


def meeting(keys: Int64s, lo: Int64s, hi: Int64s) -> tuple[Int64s, Int64s]:
    """Every pair of rows (i, j), i < j, of one key whose boxes share an element. Equal keys are next to each other.

    Where each box of a key lies wholly before the next one on the first axis on which the two differ, no two of them
    meet; that holds for grids in row-major order, which nearly all are. Other keys are looked at pair by pair.
    """
    together = keys[1:] == keys[:-1]
    if lo.shape[1]:
        axis = ((lo[1:] != lo[:-1]) | (hi[1:] != hi[:-1])).argmax(axis=1)
        row = np.arange(len(axis))
        together &= hi[row, axis] > lo[row + 1, axis]
    rows = np.flatnonzero(np.isin(keys, keys[1:][together])) if together.any() else np.zeros(0, np.int64)
    left, right = pairs_by_key(keys[rows], keys[rows])
    left, right = rows[left[left < right]], rows[right[left < right]]
    _, _, meets = intersect(lo[left], hi[left], lo[right], hi[right])
    return left[meets], right[meets]


def volume(lo: Int64s, hi: Int64s) -> Int64s:
    """Elements of every box, shape (n,)."""
    elements: Int64s = np.prod(hi - lo, axis=1, dtype=np.int64)
    return elements


def distinct(keys: Int64s, bound: int) -> tuple[Int64s, Int64s]:
    """(distinct keys, ascending; the number of each key's) of keys from 0 to `bound` - 1.

    As numpy's `unique` with its inverse, but by looking up where a table is not much longer than the keys: that takes
    a fiftieth of the time that sorting does.
    """
    if bound > _LONGEST_TABLE * len(keys) + (1 << 16):
        found, number = np.unique(keys, return_inverse=True)
        return found, number
    present = np.zeros(bound, dtype=bool)
    present[keys] = True
    numbers = np.cumsum(present, dtype=np.int32)
    return np.flatnonzero(present), numbers[keys].astype(np.int64) - 1


def first_of_each(keys: Int64s, bound: int) -> Int64s:
    """Where each distinct key from 0 to `bound` - 1 comes first, by key; see `distinct`."""
    if bound > _LONGEST_TABLE * len(keys) + (1 << 16):
        return np.unique(keys, return_index=True)[1]
    first = np.full(bound, -1, dtype=np.int64)
    first[keys[::-1]] = np.arange(len(keys) - 1, -1, -1)  # of several, the last one assigned stays
    return first[first >= 0]


def stable_order(keys: Int64s, bound: int) -> Int64s:
    """Stable argsort of keys from 0 to `bound` - 1: by 16 bits at a time, which numpy counts instead of comparing."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in (16, 32, 48):
        if bound > 1 << shift:
            order = order[np.argsort(((keys[order] >> shift) & 0xFFFF).astype(np.uint16), kind="stable")]
    return order


def unique_rows(rows: Int64s) -> tuple[Int64s, Int64s]:
    """(index of the first of each distinct row, number of each row's class); classes in lexicographic order."""
    if not rows.size:
        return np.zeros(min(1, len(rows)), np.int64), np.zeros(len(rows), np.int64)
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    inverse = np.empty(len(rows), dtype=np.int64)
    inverse[order] = np.cumsum(new) - 1
    return order[new], inverse


def subtract(
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], lo: tuple[int, ...], hi: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Disjoint boxes that cover `boxes` without the box lo:hi."""
    result = []
    for low, high in boxes:
        if any(max(a, c) >= min(b, d) for a, b, c, d in zip(low, high, lo, hi, strict=True)):
            result.append((low, high))
            continue
        left, right = list(low), list(high)
        for axis in range(len(low)):
            if left[axis] < lo[axis]:
                result.append((tuple(left), (*right[:axis], lo[axis], *right[axis + 1 :])))
                left[axis] = lo[axis]
            if right[axis] > hi[axis]:
                result.append(((*left[:axis], hi[axis], *left[axis + 1 :]), tuple(right)))
                right[axis] = hi[axis]
    return result


def collapse(sizes: Int64s, strides: list[Int64s]) -> tuple[Int64s, list[Int64s]]:
    """Join neighbouring axes that are contiguous in every stride list, row by row; axes of size one disappear.

    Arrays have shape (n, k); results have the same shape, right-aligned, padded on the left with size 1 and stride 0.
    """
    count, width = sizes.shape
    out_sizes = np.ones_like(sizes)
    out = [np.zeros_like(column) for column in strides]
    rows = np.arange(count)
    at = np.full(count, width, dtype=np.int64)  # column of the axis last written, right to left
    for axis in range(width - 1, -1, -1):
        size = sizes[:, axis]
        inner = np.minimum(at, width - 1)
        joins = at < width
        for column, result in zip(strides, out, strict=True):
            joins &= column[:, axis] == result[rows, inner] * out_sizes[rows, inner]
        joins &= size > 1
        starts = (size > 1) & ~joins
        out_sizes[rows[joins], at[joins]] *= size[joins]
        at[starts] -= 1
        out_sizes[rows[starts], at[starts]] = size[starts]
        for column, result in zip(strides, out, strict=True):
            result[rows[starts], at[starts]] = column[starts, axis]
    used = max(1, width - int(at.min())) if count and width else 1
    keep = slice(max(0, width - used), width)
    return out_sizes[:, keep], [column[:, keep] for column in out]


def row_major_strides(factors: Int64s) -> Int64s:
    """Row-major strides of every row of splits, shape (n, k)."""
    strides = np.ones_like(factors)
    strides[:, :-1] = np.cumprod(factors[:, :0:-1], axis=1)[:, ::-1]
    return strides
