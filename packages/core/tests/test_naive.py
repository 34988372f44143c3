"""The naive planner on cases small enough to write the answer out, and against plain array assignments."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.box import Affine, Box
from weft.builder import LayoutBuilder
from weft.layout import Layout, Piece
from weft.naive import (
    bits_dtype,
    elements_of,
    expected_memory,
    fill_elements,
    naive_copies,
    naive_faults,
    poisoned_memory,
    read_back,
)
from weft.testing.models import random_case

P = 0xA5  # what unwritten bytes hold


def uint8(*tensors: tuple[str, tuple[int, ...]], buffer: int) -> LayoutBuilder:
    builder = LayoutBuilder()
    for name, shape in tensors:
        builder.tensor(name, shape, "uint8")
    builder.buffer("b", "uint8", buffer, group="g")
    return builder


def memory_of(layout: Layout, **logical: list[int]) -> list[int]:
    return expected_memory({n: np.array(v, dtype=np.uint8) for n, v in logical.items()}, layout)["b"].tolist()


def test_elements_of_a_strided_box() -> None:
    # Rows 1:3 of each of 2 groups of 4 rows, 2 columns; stored with columns outermost.
    piece = Piece("w", Box((2, 4, 2), (0, 1, 0), (2, 3, 2)), "b", 3, (2, 1, 10))
    logical, memory = elements_of(piece)
    assert logical.tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert memory.tolist() == [3, 13, 4, 14, 5, 15, 6, 16]


def test_elements_of_a_scalar() -> None:
    logical, memory = elements_of(Piece("s", Box((), (), ()), "b", 5, ()))
    assert (logical.tolist(), memory.tolist()) == ([0], [5])


@pytest.mark.trap(1, 3)
def test_copies_of_an_axis_that_does_not_divide() -> None:
    """5 rows of one byte: sources by ceiling chunks of 2 (2, 2, 1), targets of 3 (3, 2)."""
    layouts: dict[str, Layout] = {}
    for name, low, high in (("s0", 0, 2), ("s1", 2, 4), ("s2", 4, 5), ("t0", 0, 3), ("t1", 3, 5)):
        builder = uint8(("w", (5, 1)), buffer=high - low)
        builder.shard("w", "b", start=low, stop=high)
        layouts[name] = builder.build()
    sources = {name: layouts[name] for name in ("s0", "s1", "s2")}
    targets = {name: layouts[name] for name in ("t0", "t1")}
    assert naive_copies(sources, targets) == {
        ("t0", "w", 0): ["s0"],
        ("t0", "w", 1): ["s0"],
        ("t0", "w", 2): ["s1"],
        ("t1", "w", 3): ["s1"],
        ("t1", "w", 4): ["s2"],
    }
    assert naive_faults(sources, targets) == set()
    assert memory_of(layouts["t1"], w=[10, 11, 12, 13, 14]) == [13, 14]
    del sources["s2"]
    assert naive_copies(sources, targets)["t1", "w", 4] == []
    assert naive_faults(sources, targets) == {("missing", "t1", "w")}


@pytest.mark.trap(4)
def test_gate_and_up_fused_per_rank_are_interleaved_by_rank() -> None:
    """gate = 0..3, up = 10..13, TP 2: ranks hold [0 1 10 11] and [2 3 12 13]."""
    held: list[list[int]] = []
    for rank in (0, 1):
        builder = uint8(("gate", (4,)), ("up", (4,)), buffer=4)
        builder.shard("gate", "b", start=2 * rank, stop=2 * rank + 2)
        builder.shard("up", "b", start=2 * rank, stop=2 * rank + 2, offset=2)
        held.append(memory_of(builder.build(), gate=[0, 1, 2, 3], up=[10, 11, 12, 13]))
    assert held == [[0, 1, 10, 11], [2, 3, 12, 13]]


@pytest.mark.trap(4, 72)
def test_alternating_columns_come_apart() -> None:
    """Columns g0 u0 g1 u1 of a (2, 4) tensor, stored as rows of gate and then rows of up."""
    builder = uint8(("gate_up", (2, 4)), buffer=8)
    builder.view("gate_up", Affine(0, (2, 2), (4, 2)), "b", Affine(0, (2, 2), (1, 2)))
    builder.view("gate_up", Affine(1, (2, 2), (4, 2)), "b", Affine(4, (2, 2), (1, 2)))
    layout = builder.build()
    assert len(layout.pieces) == 2
    assert memory_of(layout, gate_up=[0, 10, 1, 11, 2, 12, 3, 13]) == [0, 2, 1, 3, 10, 12, 11, 13]


@pytest.mark.trap(5)
def test_interleaved_groups_to_stacked_heads_with_more_ranks_than_groups() -> None:
    """2 groups of 2 q heads, k, v (1 row each). The source splits inside a group; 4 targets replicate k and v.

    Fused rows are q0 q1 k0 v0 | q2 q3 k1 v1; sources hold fused rows 0:3, 3:6, 6:8.
    """
    shapes = (("q", (4,)), ("k", (2,)), ("v", (2,)))
    rows = [("q", 0), ("q", 1), ("k", 0), ("v", 0), ("q", 2), ("q", 3), ("k", 1), ("v", 1)]
    sources: dict[str, Layout] = {}
    for n, (low, high) in enumerate(((0, 3), (3, 6), (6, 8))):
        builder = uint8(*shapes, buffer=high - low)
        for at, (name, row) in enumerate(rows[low:high]):
            builder.shard(name, "b", start=row, stop=row + 1, offset=at)
        sources[f"s{n}"] = builder.build()
    targets: dict[str, Layout] = {}
    for rank in range(4):
        builder = uint8(*shapes, buffer=3)
        builder.shard("q", "b", start=rank, stop=rank + 1)
        builder.shard("k", "b", start=rank // 2, stop=rank // 2 + 1, offset=1)
        builder.shard("v", "b", start=rank // 2, stop=rank // 2 + 1, offset=2)
        targets[f"t{rank}"] = builder.build()
    assert naive_copies(sources, targets) == {
        ("t0", "q", 0): ["s0"], ("t0", "k", 0): ["s0"], ("t0", "v", 0): ["s1"],
        ("t1", "q", 1): ["s0"], ("t1", "k", 0): ["s0"], ("t1", "v", 0): ["s1"],
        ("t2", "q", 2): ["s1"], ("t2", "k", 1): ["s2"], ("t2", "v", 1): ["s2"],
        ("t3", "q", 3): ["s1"], ("t3", "k", 1): ["s2"], ("t3", "v", 1): ["s2"],
    }  # fmt: skip
    assert naive_faults(sources, targets) == set()
    values = {"q": [0, 1, 2, 3], "k": [20, 21], "v": [30, 31]}
    assert memory_of(targets["t2"], **values) == [2, 21, 31]
    assert memory_of(sources["s1"], **values) == [30, 2, 3]


@pytest.mark.trap(8, 9)
def test_every_holder_is_listed_once() -> None:
    builder = uint8(("w", (3,)), buffer=6)
    builder.shard("w", "b")
    builder.shard("w", "b", offset=3)  # held twice by one member
    twice = builder.build()
    builder = uint8(("w", (3,)), buffer=2)
    builder.shard("w", "b", start=1)
    tail = builder.build()
    builder = uint8(("w", (3,)), buffer=3)
    builder.shard("w", "b")
    assert naive_copies({"s1": twice, "s0": tail}, {"t": builder.build()}) == {
        ("t", "w", 0): ["s1"],
        ("t", "w", 1): ["s0", "s1"],
        ("t", "w", 2): ["s0", "s1"],
    }


@pytest.mark.trap(14)
def test_padding_holds_its_value_and_gaps_stay_poisoned() -> None:
    """3 rows of 2 in a buffer of 5 rows of 3: a column of ones, a row of twos, one row nobody claims."""
    builder = uint8(("w", (3, 2)), buffer=15)
    builder.view("w", Affine(0, (3, 2), (2, 1)), "b", Affine(0, (3, 2), (3, 1)))
    builder.fill("b", 2, (3,), (3,), 1.0)
    builder.fill("b", 9, (3,), (1,), 2.0)
    layout = builder.build()
    assert memory_of(layout, w=[10, 11, 12, 13, 14, 15]) == [10, 11, 1, 12, 13, 1, 14, 15, 1, 2, 2, 2, P, P, P]
    source = uint8(("w", (3, 2)), buffer=6)
    source.shard("w", "b")
    assert naive_faults({"s": source.build()}, {"t": layout}) == {("unclaimed", "t", "b")}


@pytest.mark.parametrize(
    ("dtype", "value", "bits"),
    [("bfloat16", 1.5, 0x3FC0), ("float32", 1.5, 0x3FC00000), ("uint8", 2.0, 2), ("bool", 1.0, 1)],
)
def test_fills_are_values_and_not_bits(dtype: str, value: float, bits: int) -> None:
    builder = LayoutBuilder()
    builder.buffer("b", dtype, 2, group="g")
    builder.fill("b", 1, (1,), (1,), value)
    memory = expected_memory({}, builder.build())["b"]
    assert memory.tolist() == [int.from_bytes(bytes([P]) * memory.itemsize), bits]


@pytest.mark.trap(13)
def test_a_name_tied_at_the_source_is_fed_from_the_tensor_on_disk() -> None:
    source = uint8(("embed", (2,)), buffer=2)
    source.shard("embed", "b")
    source.tie("head", "embed")
    target = uint8(("head", (2,)), buffer=2)
    target.shard("head", "b")
    sides = {"s": source.build()}, {"t": target.build()}
    assert naive_copies(*sides) == {("t", "head", 0): ["s"], ("t", "head", 1): ["s"]}
    assert naive_faults(*sides) == set()


@pytest.mark.trap(13)
def test_a_tie_of_the_target_does_not_join_what_the_source_holds_apart() -> None:
    source = uint8(("embed", (2,)), ("head", (2,)), buffer=4)
    source.shard("embed", "b")
    source.shard("head", "b", offset=2)
    target = uint8(("embed", (2,)), buffer=2)
    target.shard("embed", "b")
    target.tie("head", "embed")
    assert naive_faults({"s": source.build()}, {"t": target.build()}) == {("tie", "s", "head")}


@pytest.mark.trap(13)
def test_ties_that_contradict_or_chain_are_faults() -> None:
    def tied(*ties: tuple[str, str]) -> Layout:
        builder = uint8(("w", (2,)), buffer=2)
        builder.shard("w", "b")
        for alias, name in ties:
            builder.tie(alias, name)
        return builder.build()

    target = {"t": tied()}
    assert naive_faults({"s0": tied(("head", "w")), "s1": tied(("head", "w"))}, target) == set()
    assert naive_faults({"s0": tied(("head", "v")), "s1": tied(("head", "w"))}, target) == {("tie", "s0", "head")}
    assert naive_faults({"s": tied(("tail", "head"), ("head", "w"))}, target) == {("tie", "s", "tail")}


def one(shape: tuple[int, ...] = (4,), dtype: str = "uint8", name: str = "w") -> Layout:
    builder = LayoutBuilder()
    builder.tensor(name, shape, dtype)
    builder.buffer("b", dtype, int(np.prod(shape)), group="g")
    builder.shard(name, "b")
    return builder.build()


@pytest.mark.trap(11, 12)
def test_faults_between_the_sides() -> None:
    assert naive_faults({"s": one()}, {"t": one()}) == set()
    assert naive_faults({"s": one()}, {"t": one((2, 2))}) == {("shape", "t", "w")}
    assert naive_faults({"s": one(), "s1": one((2, 2))}, {"t": one()}) == {("shape", "s1", "w")}
    assert naive_faults({"s": one(dtype="float32")}, {"t": one(dtype="bfloat16")}) == {("dtype", "t", "w")}
    casts = [("float32", "bfloat16")]
    assert naive_faults({"s": one(dtype="float32")}, {"t": one(dtype="bfloat16")}, casts) == set()
    assert naive_faults({"s": one(dtype="bfloat16")}, {"t": one(dtype="float32")}, casts) == {("dtype", "t", "w")}
    assert naive_faults({"s": one()}, {"t": one(name="v")}) == {("missing", "t", "v"), ("unwanted", "s", "w")}
    assert naive_faults({"s": one()}, {}) == {("unwanted", "s", "w"), ("empty", "", "")}


def test_doubled_memory_is_a_fault() -> None:
    builder = uint8(("w", (4,)), buffer=6)
    builder.shard("w", "b")
    builder.fill("b", 3, (3,), (1,))
    assert naive_faults({"s": one()}, {"t": builder.build()}) == {("doubled", "t", "b")}


def test_poison_is_every_byte() -> None:
    memory = poisoned_memory(one((3,), "float32"))
    assert memory["b"].dtype == bits_dtype("float32")
    assert memory["b"].tobytes() == bytes([P]) * 12


def test_reading_back_finds_what_was_written_and_refuses_contradictions() -> None:
    builder = uint8(("w", (3,)), ("v", (2,)), buffer=7)
    builder.shard("w", "b", start=1)
    builder.shard("w", "b", start=2, offset=4)
    builder.shard("v", "b", start=1, offset=6)
    layout = builder.build()
    memory = {"b": np.array([11, 12, 0, 0, 12, 0, 21], dtype=np.uint8)}
    assert read_back(layout, memory) == {"w": {1: 11, 2: 12}, "v": {1: 21}}
    memory["b"][4] = 13
    with pytest.raises(ValueError, match=r"w\[2\] has two values, one of them in buffer b"):
        read_back(layout, memory)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_slices_agree_with_array_assignments(seed: int) -> None:
    """Boxes give the bytes that the assignments behind them give, and reading them back gives the tensors."""
    case = random_case(Random(seed))
    values = case.values(seed)
    seen: dict[str, set[int]] = {}
    for rank in (*case.sources, *case.targets):
        memory, assigned = expected_memory(values, rank.layout), rank.assigned(values)
        for tensor, found in read_back(rank.layout, memory).items():
            assert {index: int(values[tensor].ravel()[index]) for index in found} == found
            if rank.member.is_source:
                seen.setdefault(tensor, set()).update(found)
        for fill in rank.layout.fills:
            assigned[fill.buffer][fill_elements(fill)] = memory[fill.buffer][fill_elements(fill)]
        assert {name: bits.tobytes() for name, bits in memory.items()} == {n: b.tobytes() for n, b in assigned.items()}
    assert {name: len(found) for name, found in seen.items()} == {
        name: bits.size for name, bits in values.items() if name in seen
    }
