"""Short ways through tables: what they give is what the long way gives, whichever is taken."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.table import distinct, first_of_each, meeting, stable_order


@given(st.lists(st.integers(0, 40), max_size=60), st.sampled_from([41, 1 << 18, 1 << 34, 1 << 52]))
@pytest.mark.trap(73)
def test_keys_are_numbered_as_sorting_numbers_them(small: list[int], bound: int) -> None:
    keys = np.array([key * (bound // 41) for key in small], dtype=np.int64)
    found, first, number = np.unique(keys, return_index=True, return_inverse=True)
    assert [each.tolist() for each in distinct(keys, bound)] == [found.tolist(), number.tolist()]
    assert first_of_each(keys, bound).tolist() == first.tolist()
    assert stable_order(keys, bound).tolist() == np.argsort(keys, kind="stable").tolist()


def box(ranges: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [low for low, _ in ranges], [high for _, high in ranges]


interval = st.tuples(st.integers(0, 3), st.integers(1, 2)).map(lambda each: (each[0], each[0] + each[1]))
grid = st.lists(st.sampled_from([[(0, 4)], [(0, 1), (1, 4)], [(0, 2), (2, 3), (3, 4)]]), min_size=2, max_size=2).map(
    lambda axes: [box(list(ranges)) for ranges in product(*axes)]
)
scattered = st.lists(st.lists(interval, min_size=2, max_size=2).map(box), max_size=6)


@given(st.lists(grid | scattered, max_size=5), st.booleans())
def test_boxes_that_meet_are_found_among_grids_and_others(
    keys: list[list[tuple[list[int], list[int]]]], turn: bool
) -> None:
    rows = [(n, *each) for n, boxes in enumerate(keys) for each in (boxes[::-1] if turn else boxes)]
    lo, hi = (np.array([row[end] for row in rows], dtype=np.int64).reshape(-1, 2) for end in (1, 2))
    expected = {
        (i, j)
        for i, j in combinations(range(len(rows)), 2)
        if rows[i][0] == rows[j][0] and (np.maximum(lo[i], lo[j]) < np.minimum(hi[i], hi[j])).all()
    }
    left, right = meeting(np.array([row[0] for row in rows], dtype=np.int64), lo, hi)
    assert len(left) == len(expected)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == expected


def test_scalars_of_one_key_meet() -> None:
    none = np.zeros((3, 0), np.int64)
    left, right = meeting(np.array([0, 1, 1]), none, none)
    assert (left.tolist(), right.tolist()) == ([1], [2])
