"""Boxes say exactly what array views say, in few pieces."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.box import Affine, Box, boxes_from_views, common_factors, cuts_of, refine, refines, row_major, split_axes
from weft.errors import LayoutError
from weft.layout import Piece
from weft.naive import elements_of
from weft.testing.assignments import affine

randoms = st.randoms(use_true_random=False)


def pairs(boxes) -> list[tuple[int, int]]:
    """(flat logical index, memory element) of every element of placed boxes, sorted."""
    found: list[tuple[int, int]] = []
    for box, offset, strides in boxes:
        logical, memory = elements_of(Piece("tensor", box, "buffer", offset, strides))
        found += zip(logical.tolist(), memory.tolist(), strict=True)
    return sorted(found)


def view_pairs(logical: np.ndarray, memory: np.ndarray) -> list[tuple[int, int]]:
    return sorted(zip(logical.ravel().tolist(), memory.ravel().tolist(), strict=True))


def ids(shape) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)


def random_shape(random: Random, most: int = 3) -> tuple[int, ...]:
    return tuple(random.choice((1, 2, 3, 4, 6, 7, 8, 12)) for _ in range(random.randint(0, most)))


def random_split(random: Random, shape) -> tuple[int, ...]:
    """Some split of every axis into divisors."""
    factors: list[int] = []
    for size in shape:
        while size > 1 and random.random() < 0.6:
            factor = random.choice([n for n in range(2, size + 1) if size % n == 0])
            factors.append(factor)
            size //= factor
        factors.append(size)
    return tuple(factors)


def random_view(random: Random, whole: np.ndarray) -> np.ndarray:
    """A chain of slices, splits, transposes, indexing and joins that numpy makes without copying."""
    view = whole
    for _ in range(random.randint(0, 5)):
        step = random.choice(("slice", "split", "transpose", "index", "join"))
        axis = random.randrange(view.ndim) if view.ndim else None
        if axis is None or view.size == 0:
            break
        size = view.shape[axis]
        before = (slice(None),) * axis
        if step == "slice":
            low = random.randint(0, size - 1)
            view = view[(*before, slice(low, random.randint(low + 1, size), random.choice((1, 1, 1, 2, 3))))]
        elif step == "split":
            factor = random.choice([n for n in range(1, size + 1) if size % n == 0])
            view = view.reshape(*view.shape[:axis], factor, size // factor, *view.shape[axis + 1 :])
        elif step == "transpose":
            axes = list(range(view.ndim))
            random.shuffle(axes)
            view = view.transpose(axes)
        elif step == "index":
            view = view[(*before, random.randrange(size), ...)]
        elif axis + 1 < view.ndim:
            joined = view.reshape(*view.shape[:axis], size * view.shape[axis + 1], *view.shape[axis + 2 :])
            view = joined if np.shares_memory(joined, whole) else view
        assert np.shares_memory(view, whole)
    return view


@given(randoms)
@settings(max_examples=300, deadline=None)
def test_boxes_of_any_view_are_that_view(random: Random) -> None:
    whole = ids(random_shape(random))
    logical = random_view(random, whole)
    room = ids((logical.size * 2 + 5,))
    axes = list(range(logical.ndim))
    random.shuffle(axes)
    dense = room[random.randint(0, 5) :][: logical.size].reshape([logical.shape[axis] for axis in axes])
    memory = dense.transpose([axes.index(axis) for axis in range(logical.ndim)])
    cuts = cuts_of(random_split(random, whole.shape)) if random.random() < 0.5 else ()
    boxes = boxes_from_views(whole.shape, affine(logical, whole), affine(memory, room), cuts)
    assert pairs(boxes) == view_pairs(logical, memory)
    assert all(refines(box.factors, whole.shape) for box, _, _ in boxes)
    assert all(
        0 <= low < high <= n for box, _, _ in boxes for low, high, n in zip(box.lo, box.hi, box.factors, strict=True)
    )


@given(randoms)
@settings(max_examples=300, deadline=None)
def test_refining_keeps_every_element_where_it_was(random: Random) -> None:
    shape = random_shape(random)
    factors, other = random_split(random, shape), random_split(random, shape)
    lo = tuple(random.randrange(n) for n in factors)
    hi = tuple(random.randint(low + 1, n) for low, n in zip(lo, factors, strict=True))
    box = Box(factors, lo, hi)
    strides = [step * random.randint(1, 3) for step in row_major(box.sizes)]
    common = common_factors(shape, cuts_of(factors) | cuts_of(other))
    assert refines(common, shape)
    assert pairs(refine(box, 7, strides, common)) == pairs([(box, 7, tuple(strides))])


@given(randoms)
@settings(max_examples=200, deadline=None)
def test_a_view_of_a_nested_split_is_one_box(random: Random) -> None:
    """Pieces do not multiply with rows, heads or columns (traps 20 and 72)."""
    whole = ids(random_shape(random, 2))
    view = whole.reshape(random_split(random, whole.shape))
    ranges = [(low, random.randint(low + 1, n)) for n in view.shape for low in [random.randrange(n)]]
    view = view[(*(slice(low, high) for low, high in ranges), ...)]
    axes = list(range(view.ndim))
    random.shuffle(axes)
    view = view.transpose(axes)
    memory = ids((view.size,))
    assert len(boxes_from_views(whole.shape, affine(view, whole), affine(memory.reshape(view.shape), memory))) == 1


@given(randoms)
@settings(max_examples=200, deadline=None)
def test_a_range_across_a_split_of_depth_d_is_at_most_2d_minus_1_boxes(random: Random) -> None:
    factors = tuple(random.randint(2, 6) for _ in range(random.randint(1, 4)))
    rows = math.prod(factors)
    low = random.randrange(rows)
    high = random.randint(low + 1, rows)
    boxes = refine(Box((rows,), (low,), (high,)), 0, (1,), factors)
    assert len(boxes) <= 2 * len(factors) - 1
    assert pairs(boxes) == [(row, row - low) for row in range(low, high)]


@pytest.mark.trap(4, 5, 20, 72)
@pytest.mark.parametrize(
    ("shape", "view", "count"),
    [
        ((1536, 1024), lambda x: x.reshape(8, 3, 64, 1024)[:, 1], 1),  # k rows of interleaved q, k, v
        ((1536, 1024), lambda x: x.reshape(8, 3, 64, 1024)[2:6, 0], 1),  # q rows of one rank
        ((512, 2048), lambda x: x.reshape(512, 1024, 2)[:, :, 1], 1),  # every other column
        ((512, 2048), lambda x: x.reshape(512, 1024, 2)[:, 256:512, 0].T, 1),  # of one rank, transposed
        ((128, 64, 32), lambda x: x[3::8], 1),  # experts dealt out to 8 ranks
        ((4096, 16), lambda x: x.reshape(16, 2, 128, 16)[:, :, 64:], 1),  # second rotary halves
        ((1000, 64), lambda x: x[:, :13], 1),  # a strided prefix
        ((100, 64), lambda x: x[:50], 1),
        ((10,), lambda x: x[::3], 4),  # 3 does not divide 10: the one thing that falls apart
    ],
)
def test_what_frameworks_do_is_one_box(shape, view, count) -> None:
    whole = ids(shape)
    logical = view(whole)
    memory = ids(logical.shape)
    boxes = boxes_from_views(shape, affine(logical, whole), affine(memory, memory))
    assert len(boxes) == count
    assert pairs(boxes) == view_pairs(logical, memory)


def test_a_range_that_straddles_a_cut_is_a_few_boxes() -> None:
    # Rows 5:19 in groups of 8: 5:8, the whole middle group, 16:19.
    boxes = refine(Box((32, 4), (5, 0), (19, 4)), 100, (4, 1), (4, 8, 4))
    assert boxes == [
        (Box((4, 8, 4), (0, 5, 0), (1, 8, 4)), 100, (0, 4, 1)),
        (Box((4, 8, 4), (1, 0, 0), (2, 8, 4)), 112, (0, 4, 1)),
        (Box((4, 8, 4), (2, 0, 0), (3, 3, 4)), 144, (0, 4, 1)),
    ]


@pytest.mark.parametrize(
    ("shape", "cuts", "factors"),
    [
        ((), (), ()),
        ((1,), (), ()),
        ((6, 4), (), (6, 4)),
        ((6, 4), (12,), (2, 3, 4)),
        ((6, 4), (2,), (6, 2, 2)),
        ((12,), (4, 6), (3, 2, 2)),  # 4 and 6 do not divide: the smaller stays, 2 replaces the larger
        ((10,), (3,), (10,)),
        ((0, 4), (2,), (0, 4)),
        ((4,), (0, 4, 100), (4,)),  # cuts outside the tensor say nothing
    ],
)
def test_common_factors(shape, cuts, factors) -> None:
    assert common_factors(shape, cuts) == factors


@given(randoms)
def test_common_factors_refine_and_have_every_cut_that_divides(random: Random) -> None:
    shape = random_shape(random)
    wanted = {random.randint(1, 40) for _ in range(random.randint(0, 4))}
    factors = common_factors(shape, wanted)
    assert refines(factors, shape)
    split = random_split(random, shape)
    assert cuts_of(common_factors(shape, cuts_of(split))) == cuts_of(split) | cuts_of(shape)


@pytest.mark.parametrize(
    ("factors", "shape", "answer"),
    [
        ((2, 3, 4), (6, 4), True),
        ((6, 4), (6, 4), True),
        ((4, 6), (6, 4), False),
        ((24,), (6, 4), False),
        ((), (), True),
        ((1,), (), True),
        ((2, 2), (6,), False),
        ((-2, -3), (6,), False),
        ((0,), (0,), False),
    ],
)
def test_refines(factors, shape, answer) -> None:
    assert refines(factors, shape) is answer


def test_split_axes_joins_what_is_contiguous_in_every_view() -> None:
    assert split_axes((2, 3, 4), [(12, 4, 1)]) == ([24], [[1]])
    assert split_axes((2, 3, 4), [(12, 4, 1), (12, 4, 1)]) == ([24], [[1], [1]])
    assert split_axes((2, 3, 4), [(12, 4, 1), (100, 4, 1)]) == ([2, 12], [[12, 1], [100, 1]])
    assert split_axes((2, 1, 4), [(4, 77, 1)]) == ([8], [[1]])
    assert split_axes((1, 1), [(5, 5)]) == ([], [[]])


def test_a_box_knows_its_size_and_place() -> None:
    box = Box((4, 3, 5), (1, 0, 2), (3, 3, 4))
    assert (box.sizes, box.numel, box.flat_strides, box.flat_start) == ((2, 3, 2), 12, (15, 5, 1), 17)
    assert str(box) == "[1:3, 0:3, 2:4] of (4, 3, 5)"
    assert Box((), (), ()).numel == 1


@pytest.mark.parametrize(
    "logical",
    [
        Affine(0, (5,), (1,)),  # past the end
        Affine(-1, (2,), (1,)),
        Affine(3, (4,), (-1,)),  # backwards
        Affine(0, (2,), (0,)),  # one element twice
        Affine(0, (-2,), (1,)),
    ],
)
def test_a_view_that_is_not_of_the_tensor_is_an_error(logical: Affine) -> None:
    with pytest.raises(LayoutError, match="does not lie inside a tensor of shape"):
        boxes_from_views((2, 2), logical, Affine(0, logical.sizes, (1,)))


def test_views_of_different_sizes_are_an_error() -> None:
    with pytest.raises(LayoutError, match=r"\(2,\), memory view \(3,\)"):
        boxes_from_views((4,), Affine(0, (2,), (1,)), Affine(0, (3,), (1,)))


def test_a_sliding_window_gives_every_element_all_its_places() -> None:
    logical, memory = Affine(0, (3, 2), (1, 1)), Affine(0, (3, 2), (2, 1))
    assert pairs(boxes_from_views((4,), logical, memory)) == [(0, 0), (1, 1), (1, 2), (2, 3), (2, 4), (3, 5)]
