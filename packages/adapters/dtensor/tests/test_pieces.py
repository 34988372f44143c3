"""Layouts of local tensors: fused ones as pieces of many logical tensors, strided ones where they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import LayoutError, NotSupportedError
from weft.layout import Layout
from weft.names import NameMap, NameRule, Skip, expand
from weft_dtensor import family_rules, identity_names
from weft_dtensor.naming import default_names
from weft_dtensor.pieces import FlatRange, LocalTensor, group_of, layout_of, row_major_strides
from weft_dtensor.shards import Split, held_ranges


def check(layout: Layout, memory: dict[str, torch.Tensor], logical: dict[str, torch.Tensor]) -> int:
    """Every piece's memory against the box it says it is; the number of elements that were compared."""
    compared = 0
    for piece in layout:
        found = memory[piece.buffer].as_strided(piece.box.sizes, piece.strides, piece.offset)
        whole = logical[piece.tensor].reshape(piece.box.factors)
        box = tuple(slice(low, high) for low, high in zip(piece.box.lo, piece.box.hi, strict=True))
        assert torch.equal(found, whole[box]), piece
        compared += found.numel()
    return compared


@st.composite
def splits_of(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Split]:
    splits = []
    for _ in range(draw(st.integers(0, 3))):
        parts = draw(st.integers(1, 4))
        before = draw(st.sampled_from([1, 1, 2, 3]))
        splits.append(Split(draw(st.integers(0, len(shape) - 1)), parts, draw(st.integers(0, parts - 1)), before))
    return splits


@pytest.mark.trap(13, 16, 71)
@settings(max_examples=150, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 5), st.permutations([0, 1, 2]), st.data())
def test_fused_experts_are_pieces_of_every_expert_however_sharded(
    experts: int, inner: int, hidden: int, order: list[int], data: st.DataObject
) -> None:
    shape = (experts, 2 * inner, hidden)
    splits = data.draw(splits_of(shape))
    try:
        ranges = held_ranges(shape, splits)
    except LayoutError:
        return  # torch cannot say who holds what
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    local = whole
    for axis, each in enumerate(ranges):
        rows = torch.tensor([n for start, stop in each for n in range(start, stop)], dtype=torch.int64)
        local = local.index_select(axis, rows)
    stored = local.permute(order).contiguous()  # in memory with its axes in any order
    strides = tuple(stored.stride()[order.index(axis)] for axis in range(3))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    names = identity_names({name: shape}, family_rules("qwen3_moe", {name: shape}))
    layout = layout_of([LocalTensor(name, shape, "float32", ranges, strides)], names, {})
    logical = {}
    for expert in range(experts):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        logical[f"{prefix}.gate_proj.weight"] = whole[expert, :inner]
        logical[f"{prefix}.up_proj.weight"] = whole[expert, inner:]
    assert check(layout, {name: stored.flatten()}, logical) == local.numel()
    assert all(tensor.shape == (inner, hidden) for tensor in layout.tensors)


@pytest.mark.trap(3, 13, 71)
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 5), st.booleans(), st.data())
def test_ranges_of_flattened_tensors_are_a_few_boxes_of_every_expert(
    experts: int, inner: int, hidden: int, fused: bool, data: st.DataObject
) -> None:
    shape = (experts, 2 * inner, hidden)
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    names = identity_names({name: shape}, family_rules("qwen3_moe", {name: shape}) if fused else ())
    layout = layout_of([FlatRange(name, shape, "float32", start, stop - start)], names, {})
    logical = {
        f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight": whole[expert].view(2, inner, hidden)[n]
        for expert in range(experts)
        for n, part in enumerate(("gate", "up"))
    }
    memory = {name: whole.flatten()[start:stop].clone()}
    assert check(layout, memory, logical if fused else {name: whole}) == stop - start
    held = {piece.tensor for piece in layout}
    assert len(layout.pieces) <= (3 * len(held) if fused else 5)


def local(name: str, *shape: int) -> LocalTensor:
    """A whole tensor, dense."""
    return LocalTensor(name, shape, "float32", held_ranges(shape, ()), row_major_strides(shape))


def test_a_fused_projection_is_the_rows_of_its_parts() -> None:
    names = NameMap([NameRule(("w.{n}",), ("q.{n}", "k.{n}", "v.{n}"))])
    layout = layout_of([local("w.3", 6, 2)], names, {})
    assert [(piece.tensor, piece.offset, piece.box.hi) for piece in layout] == [
        ("q.3", 0, (2, 2)),
        ("k.3", 4, (2, 2)),
        ("v.3", 8, (2, 2)),
    ]


@pytest.mark.parametrize("count", [3, 16, 40])
def test_a_fused_tensor_that_does_not_divide_is_refused_by_name(count: int) -> None:
    names = NameMap([NameRule(("w",), expand("w.{part}", part=range(count)))])
    with pytest.raises(LayoutError, match=rf"w: shape \(4, 10\) does not divide into the {count} tensors"):
        layout_of([local("w", 4, 10)], names, {})


@pytest.mark.trap(6, 13)
def test_every_name_is_covered_or_skipped_with_a_reason() -> None:
    names = NameMap([NameRule(("a",), ("b",))], skips=[Skip("cache*", "not a weight")])
    layout = layout_of([local("a", 2), local("cache.0", 3)], names, {})
    assert [tensor.name for tensor in layout.tensors] == ["b"]
    assert layout.skipped == (("cache.0", "not a weight"),)
    with pytest.raises(LayoutError, match="extra: no rule covers this name"):
        layout_of([local("a", 2), local("extra", 3)], names, {})


def test_stacks_of_local_tensors_are_refused_by_name() -> None:
    with pytest.raises(NotSupportedError, match="a, b"):
        layout_of([local("a", 2), local("b", 2)], NameMap([NameRule(("a", "b"), ("c",))]), {})


@pytest.mark.trap(13)
def test_ties_go_by_the_logical_names() -> None:
    names = NameMap([NameRule(("emb",), ("embed.weight",)), NameRule(("out",), ("head.weight",))])
    layout = layout_of([local("emb", 4, 2)], names, {"out": "emb"})
    assert [(tie.alias, tie.name) for tie in layout.ties] == [("head.weight", "embed.weight")]


@pytest.mark.trap(71)
def test_only_families_in_the_table_have_their_experts_renamed() -> None:
    shapes = {"model.layers.0.mlp.experts.down_proj": (2, 3, 4), "model.norm.weight": (4,)}
    known, other = (default_names(shapes, {"model_type": family}) for family in ("qwen3_moe", "someone_elses"))
    assert known.logical("model.layers.0.mlp.experts.down_proj") == tuple(
        f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(2)
    )
    assert other.logical("model.layers.0.mlp.experts.down_proj") == ("model.layers.0.mlp.experts.down_proj",)
    assert known.logical("model.norm.weight") == ("model.norm.weight",)


def test_groups_are_layers_or_modules() -> None:
    names = ["model.layers.12.mlp.experts.3.up.weight", "model.norm.weight", "weight", "0.bias"]
    assert [group_of(name) for name in names] == ["model.layers.12", "model.norm", "weight", "0"]
