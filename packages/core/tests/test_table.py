"""Tables instead of sorting: what they give is what sorting gives, whichever way is taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.table import distinct, first_of_each, stable_order


@given(st.lists(st.integers(0, 40), max_size=60), st.sampled_from([41, 1 << 18, 1 << 34, 1 << 52]))
@pytest.mark.trap(73)
def test_keys_are_numbered_as_sorting_numbers_them(small: list[int], bound: int) -> None:
    keys = np.array([key * (bound // 41) for key in small], dtype=np.int64)
    found, first, number = np.unique(keys, return_index=True, return_inverse=True)
    assert [each.tolist() for each in distinct(keys, bound)] == [found.tolist(), number.tolist()]
    assert first_of_each(keys, bound).tolist() == first.tolist()
    assert stable_order(keys, bound).tolist() == np.argsort(keys, kind="stable").tolist()
