"""Ranges of shards against torch's own chunks of real tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import LayoutError
from weft_dtensor.shards import Ranges, Split, held_ranges


def chunk(tensor: torch.Tensor, parts: int, index: int, axis: int) -> torch.Tensor:
    """Chunk `index`, empty where torch makes fewer chunks than asked."""
    chunks = torch.chunk(tensor, parts, axis)
    return chunks[index] if index < len(chunks) else tensor.narrow(axis, 0, 0)


def as_placed(whole: torch.Tensor, splits: list[Split]) -> torch.Tensor:
    """What a rank holds by torch's placements, read from left to right."""
    for split in splits:
        parts = [chunk(whole, split.before, n, split.axis) for n in range(split.before)]
        whole = torch.cat([chunk(part, split.parts, split.index, split.axis) for part in parts], split.axis)
    return whole


def taken(whole: torch.Tensor, held: tuple[Ranges, ...]) -> torch.Tensor:
    """The elements in these ranges."""
    for axis, ranges in enumerate(held):
        at = [n for start, stop in ranges for n in range(start, stop)]
        whole = whole.index_select(axis, torch.tensor(at, dtype=torch.int64))
    return whole


@st.composite
def meshes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Split]]:
    """A shape and the splits of one rank, over up to three mesh dimensions on any axes."""
    shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
    splits = []
    for _ in range(draw(st.integers(0, 3))):
        parts = draw(st.integers(1, 5))
        splits.append(Split(draw(st.integers(0, len(shape) - 1)), parts, draw(st.integers(0, parts - 1))))
    return shape, splits


@pytest.mark.trap(3, 16)
@settings(max_examples=200, deadline=None)
@given(meshes())
def test_shards_of_any_axes_over_any_mesh_are_torchs_chunks(mesh: tuple[tuple[int, ...], list[Split]]) -> None:
    shape, splits = mesh
    whole = torch.arange(math.prod(shape)).view(shape)
    held = held_ranges(shape, splits)
    assert torch.equal(taken(whole, held), as_placed(whole, splits))
    assert all(len(ranges) <= 1 for ranges in held)


@pytest.mark.trap(16)
@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(2, 6), st.data())
def test_a_strided_shard_alone_is_a_chunk_of_every_chunk(
    size: int, parts: int, before: int, data: st.DataObject
) -> None:
    split = Split(0, parts, data.draw(st.integers(0, parts - 1)), before)
    whole = torch.arange(size)
    assert torch.equal(taken(whole, held_ranges((size,), [split])), as_placed(whole, [split]))


@pytest.mark.trap(16)
@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(2, 5), st.data())
def test_fsdp_over_tensor_parallel_is_exact_or_refused(size: int, fsdp: int, tp: int, data: st.DataObject) -> None:
    at, tensor_rank = data.draw(st.integers(0, fsdp - 1)), data.draw(st.integers(0, tp - 1))
    whole = torch.arange(size)
    applied = chunk(chunk(whole, tp, tensor_rank, 0), fsdp, at, 0)
    splits = [Split(0, fsdp, at, tp), Split(0, tp, tensor_rank)]
    if torch.equal(applied, as_placed(whole, splits)):
        assert torch.equal(taken(whole, held_ranges((size,), splits)), applied)
    else:
        with pytest.raises(LayoutError, match=rf"axis 0 of \({size},\) does not divide over its two mesh dimensions"):
            held_ranges((size,), splits)


def test_the_lengths_that_torch_itself_mistakes_are_refused_on_every_rank_concerned() -> None:
    # 9 rows over tp 2 are 5 and 4; over fsdp 4 these are 2, 2, 1, 0 and 1, 1, 1, 1: placements cannot say so.
    refused = []
    for at in range(4):
        for tensor_rank in range(2):
            try:
                held_ranges((9,), [Split(0, 4, at, 2), Split(0, 2, tensor_rank)])
            except LayoutError:
                refused.append((at, tensor_rank))
    assert refused == [(3, 0), (3, 1)]


@pytest.mark.trap(4, 16)
def test_packed_parts_cut_by_tensor_parallelism_are_refused_where_fsdp_cuts_the_same_axis() -> None:
    gate_up = [Split(0, 2, 0, 2), Split(0, 2, 0, 2)]  # FSDP has rows 0 and 1, and placements say 0 and 4
    with pytest.raises(LayoutError, match="holds 0:2, by torch's placements 0:1, 4:5"):
        held_ranges((8,), gate_up)
    assert held_ranges((8, 4), [Split(1, 2, 0), gate_up[1]]) == (((0, 2), (4, 6)), ((0, 2),))


@pytest.mark.trap(8, 16)
@given(st.integers(1, 30), st.integers(1, 6))
def test_all_ranks_together_hold_every_row_once(size: int, parts: int) -> None:
    rows = [
        n
        for at in range(parts)
        for start, stop in held_ranges((size,), [Split(0, parts, at)])[0]
        for n in range(start, stop)
    ]
    assert rows == list(range(size))


def test_an_empty_axis_is_held_by_nobody() -> None:
    assert held_ranges((0, 3), [Split(0, 2, 1)]) == ((), ((0, 3),))
