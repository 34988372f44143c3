"""Layouts name what is wrong with them, survive the wire, and are equal when they say the same."""

from __future__ import annotations

from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.box import Affine, Box
from weft.builder import LayoutBuilder
from weft.errors import LayoutError, RecordError
from weft.layout import Kind, Layout, Piece
from weft.naive import elements_of, fill_elements
from weft.testing.models import random_case

randoms = st.randoms(use_true_random=False)


def started() -> LayoutBuilder:
    """A tensor `w` of shape (6, 4) and a buffer `b` of 24 elements."""
    builder = LayoutBuilder()
    builder.tensor("w", (6, 4), "bfloat16")
    builder.buffer("b", "bfloat16", 24, group="layer0")
    return builder


FAULTS = {
    "w: declared as bfloat16(6, 4) and as float32(6, 4)": lambda b: b.tensor("w", (6, 4), "float32"),
    "w: declared as bfloat16(6, 4) and as bfloat16(4, 6)": lambda b: b.tensor("w", (4, 6), "bfloat16"),
    "y: dtype 'complex64' is none of": lambda b: b.tensor("y", (2,), "complex64"),
    "z: shape (2, -3) has a negative size": lambda b: b.tensor("z", (2, -3), "uint8"),
    "buffer b: declared twice": lambda b: b.buffer("b", "bfloat16", 24, group="layer0"),
    "buffer d: dtype 'half' is none of": lambda b: b.buffer("d", "half", 4, group="layer0"),
    "buffer e: -4 elements": lambda b: b.buffer("e", "uint8", -4, group="layer0"),
    "piece of x in b: declare both first": lambda b: b.piece("x", Box((), (), ()), "b", 0, ()),
    "piece of w in c: declare both first": lambda b: b.piece("w", Box((6, 4), (0, 0), (1, 4)), "c", 0, (4, 1)),
    "view of x in b: declare the tensor first": lambda b: b.view(
        "x", Affine(0, (1,), (1,)), "b", Affine(0, (1,), (1,))
    ),
    "shard of x in b: declare the tensor first": lambda b: b.shard("x", "b"),
    "w in buffer b: view Affine(offset=20, sizes=(5,), strides=(1,)) does not lie inside": lambda b: b.view(
        "w", Affine(20, (5,), (1,)), "b", Affine(0, (5,), (1,))
    ),
    "w in buffer b: logical view has sizes (5,), memory view (4,)": lambda b: b.view(
        "w", Affine(0, (5,), (1,)), "b", Affine(0, (4,), (1,))
    ),
    "w in buffer b: no shard 0:None of axis 2 of (6, 4)": lambda b: b.shard("w", "b", axis=2),
    "w in buffer b: no shard 4:2 of axis 0 of (6, 4)": lambda b: b.shard("w", "b", start=4, stop=2),
    "w [0:8, 0:4] of (6, 4) in buffer b: the range is empty or outside": lambda b: b.shard("w", "b", stop=8),
    "w [-1:4, 0:4] of (6, 4) in buffer b: the range is empty or outside": lambda b: b.shard("w", "b", start=-1, stop=4),
    "w [3:3, 0:4] of (6, 4) in buffer b: the range is empty or outside": lambda b: b.piece(
        "w", Box((6, 4), (3, 0), (3, 4)), "b", 0, (4, 1)
    ),
    "w [0:6, 0:4] of (6, 4) in buffer b: elements 1..24 leave the buffer of 24": lambda b: b.shard("w", "b", offset=1),
    "w [0:6, 0:4] of (6, 4) in buffer b: elements -1..22 leave the buffer of 24": lambda b: b.shard(
        "w", "b", offset=-1
    ),
    "w [0:6, 0:4] of (6, 4) in buffer b: elements 20..3 leave the buffer": lambda b: b.piece(
        "w", Box((6, 4), (0, 0), (6, 4)), "b", 20, (-4, 1)
    ),
    "w [0:4, 0:6] of (4, 6) in buffer b: the split does not refine shape (6, 4)": lambda b: b.piece(
        "w", Box((4, 6), (0, 0), (4, 6)), "b", 0, (6, 1)
    ),
    "w in buffer b: lo, hi, strides and factors differ in length": lambda b: b.piece(
        "w", Box((6, 4), (0,), (6, 4)), "b", 0, (4, 1)
    ),
    "w [0:6, 0:4] of (6, 4) in buffer f: buffer holds float32, the tensor is declared bfloat16": lambda b: (
        b.buffer("f", "float32", 24, group="layer0"),
        b.shard("w", "f"),
    ),
    "fill of buffer c: there is no such buffer": lambda b: b.fill("c", 0, (1,), (1,)),
    "fill of buffer b: bfloat16 cannot hold 1e+39": lambda b: b.fill("b", 0, (1,), (1,), 1e39),
    "fill of buffer i: uint8 cannot hold 256.0": lambda b: (
        b.buffer("i", "uint8", 4, group="g"),
        b.fill("i", 0, (1,), (1,), 256),
    ),
    "fill of buffer i: uint8 cannot hold 0.5": lambda b: (
        b.buffer("i", "uint8", 4, group="g"),
        b.fill("i", 0, (1,), (1,), 0.5),
    ),
    "fill of buffer b: elements 20..24 do not lie in its 24": lambda b: b.fill("b", 20, (5,), (1,)),
    "fill of buffer b: elements -1..1 do not lie in its 24": lambda b: b.fill("b", -1, (3,), (1,)),
    "fill of buffer b: sizes (2, 2) and strides (1,)": lambda b: b.fill("b", 0, (2, 2), (1,)),
    "fill of buffer b: sizes (2,) and strides (-1,)": lambda b: b.fill("b", 5, (2,), (-1,)),
    "fill of buffer b: sizes (0,) and strides (1,)": lambda b: b.fill("b", 0, (0,), (1,)),
    "head: tied to x and to w": lambda b: (b.tie("head", "w"), b.tie("head", "x")),
    "w: tied to w and to itself": lambda b: b.tie("w", "w"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    builder = started()
    FAULTS[fault](builder)
    with pytest.raises(LayoutError) as caught:
        builder.build()
    assert caught.value.faults[0].startswith(fault)


def test_all_faults_are_named_at_once() -> None:
    builder = started()
    for make in FAULTS.values():
        make(builder)
    with pytest.raises(LayoutError) as caught:
        builder.build()
    for fault in FAULTS:
        assert any(found.startswith(fault) for found in caught.value.faults), fault
        assert fault in str(caught.value)


def test_scratch_slots_must_be_positive() -> None:
    with pytest.raises(LayoutError, match="scratch_slots is 0"):
        LayoutBuilder(scratch_slots=0).build()


def test_pieces_come_back_as_they_were_given() -> None:
    builder = started()
    builder.tensor("scalar", (), "float32")
    builder.tensor("qkv", (4, 3, 2), "bfloat16")
    builder.tensor("odd", (6, 1, 2), "bfloat16")
    builder.buffer("s", "float32", 3, group="layer1", kind=Kind.SCRATCH)
    builder.buffer("q", "bfloat16", 100, group="layer0", kind=Kind.PRODUCED)
    builder.shard("w", "b", axis=1, start=1, stop=3, offset=4)
    builder.shard("scalar", "s", offset=2)
    builder.piece("odd", Box((2, 3, 2), (0, 1, 0), (2, 2, 2)), "q", 60, (2, 0, 1))
    builder.piece("qkv", Box((2, 2, 3, 2), (1, 0, 1, 0), (2, 2, 2, 2)), "q", 7, (50, 9, 3, 1))
    layout = builder.build()
    assert list(layout) == [
        Piece("w", Box((6, 4), (0, 1), (6, 3)), "b", 4, (2, 1)),
        Piece("scalar", Box((), (), ()), "s", 2, ()),
        Piece("odd", Box((2, 3, 2), (0, 1, 0), (2, 2, 2)), "q", 60, (2, 0, 1)),
        Piece("qkv", Box((2, 2, 3, 2), (1, 0, 1, 0), (2, 2, 2, 2)), "q", 7, (50, 9, 3, 1)),
    ]
    assert layout.groups == ("layer0", "layer1")
    assert [(b.name, b.kind, b.group) for b in layout.buffers] == [
        ("b", Kind.LIVE, 0), ("s", Kind.SCRATCH, 1), ("q", Kind.PRODUCED, 0),
    ]  # fmt: skip
    assert layout.nbytes == 24 * 2 + 3 * 4 + 100 * 2


@pytest.mark.trap(1, 3)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [24, 25, 7])
def test_shards_by_ceiling_chunks_end_with_the_remainder(rows: int, ranks: int) -> None:
    """A rank past the end holds no piece; the last one holds its remainder and not the whole axis."""
    step = -(-rows // ranks)
    held: list[int] = []
    for rank in range(ranks):
        low, high = min(rank * step, rows), min((rank + 1) * step, rows)
        builder = LayoutBuilder()
        builder.tensor("w", (rows, 3), "uint8")
        builder.buffer("b", "uint8", (high - low) * 3, group="g")
        builder.shard("w", "b", start=low, stop=high)
        for piece in builder.build():
            logical, memory = elements_of(piece)
            assert memory.tolist() == list(range((high - low) * 3))
            held += logical.tolist()
    assert held == list(range(rows * 3))


@given(randoms)
@settings(max_examples=60, deadline=None)
def test_layouts_survive_the_wire(random: Random) -> None:
    case = random_case(random)
    for rank in (*case.sources, *case.targets):
        copy = Layout.decode(rank.layout.encoded)
        assert copy == rank.layout
        assert copy.encoded == rank.layout.encoded
        assert list(copy) == list(rank.layout)
        assert hash(copy) == hash(rank.layout)


def variant(**change: object) -> Layout:
    """A layout with one thing changed."""
    said: dict[str, object] = {
        "shape": (6, 4), "dtype": "bfloat16", "name": "w", "buffer": "b", "numel": 30, "group": "g", "kind": Kind.LIVE,
        "start": 0, "offset": 0, "fill": 0.0, "tie": "head", "skip": "rotary", "slots": 1,
    } | change  # fmt: skip
    builder = LayoutBuilder(scratch_slots=said["slots"])
    builder.tensor(said["name"], said["shape"], said["dtype"])
    builder.buffer(said["buffer"], said["dtype"], said["numel"], group=said["group"], kind=said["kind"])
    builder.shard(said["name"], said["buffer"], start=said["start"], offset=said["offset"])
    builder.fill(said["buffer"], 28, (2,), (1,), said["fill"])
    builder.tie(said["tie"], said["name"])
    builder.skip(said["skip"], "made by the engine")
    return builder.build()


@pytest.mark.trap(18)
def test_the_address_depends_on_everything_a_layout_says_and_on_nothing_else() -> None:
    changes = [
        {}, {"shape": (3, 8)}, {"dtype": "float16"}, {"name": "v"}, {"buffer": "c"}, {"numel": 31}, {"group": "h"},
        {"kind": Kind.SCRATCH}, {"start": 1}, {"offset": 1}, {"fill": 1.0}, {"tie": "tail"}, {"skip": "mask"},
        {"slots": 2},
    ]  # fmt: skip
    addresses = [variant(**change).address for change in changes]
    assert len(set(addresses)) == len(changes)
    assert [variant(**change).address for change in changes] == addresses
    assert variant() != "a string"


def test_the_order_of_ties_does_not_change_the_address() -> None:
    first, second = started(), started()
    first.tie("a", "w"), first.tie("b", "w")
    second.tie("b", "w"), second.tie("a", "w")
    assert first.build().address == second.build().address


def test_a_layout_of_nothing_is_a_layout() -> None:
    layout = LayoutBuilder().build()
    assert (len(layout.pieces), layout.nbytes, list(layout)) == (0, 0, [])
    assert Layout.decode(layout.encoded) == layout


def check_sane(layout: Layout) -> None:
    """Whatever decodes must be usable: every piece lies in its tensor and in its buffer."""
    sizes = {buffer.name: buffer.numel for buffer in layout.buffers}
    numels = {tensor.name: tensor.numel for tensor in layout.tensors}
    assert layout.nbytes >= 0
    assert isinstance(layout.address, str)
    for piece in layout:
        assert piece.box.numel <= numels[piece.tensor]
        if piece.box.numel < 10_000 and numels[piece.tensor] < 10_000:
            logical, memory = elements_of(piece)
            assert 0 <= logical.min() <= logical.max() < numels[piece.tensor]
            assert 0 <= memory.min() <= memory.max() < sizes[piece.buffer]
    for fill in layout.fills:
        if np.prod(fill.sizes, dtype=float) < 10_000:
            assert fill_elements(fill).max(initial=0) < sizes[fill.buffer]


@given(randoms, st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_records_are_record_errors(random: Random, data: st.DataObject) -> None:
    record = bytearray(random_case(random, units=2).targets[0].layout.encoded)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(record) - 1))
        match data.draw(st.sampled_from(("change", "cut", "insert", "truncate"))):
            case "change":
                record[at] = data.draw(st.integers(0, 255))
            case "cut":
                del record[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                record[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "truncate":
                del record[at + 1 :]
        if not record:
            break
    try:
        layout = Layout.decode(bytes(record))
    except RecordError:
        return
    check_sane(layout)


@given(st.binary(max_size=200))
def test_random_bytes_are_record_errors(data: bytes) -> None:
    with pytest.raises(RecordError):
        Layout.decode(data)


# Position of each field of the record, and what it is replaced by.
DAMAGE = {
    "another format": (0, 3),
    "no tensors": (1, []),
    "one name for two tensors": (1, [["w", [6, 4], "bfloat16"], ["w", [6, 4], "bfloat16"]]),
    "another shape": (1, [["w", [4, 6], "bfloat16"]]),
    "a negative shape": (1, [["w", [-6, -4], "bfloat16"]]),
    "a huge shape": (1, [["w", [2**62, 2**62], "bfloat16"]]),
    "an unknown dtype": (1, [["w", [6, 4], "complex64"]]),
    "another dtype": (1, [["w", [6, 4], "float16"]]),
    "no groups": (2, []),
    "no buffers": (3, []),
    "an unknown kind": (3, [["b", "bfloat16", 30, "elsewhere", 0]]),
    "a small buffer": (3, [["b", "bfloat16", 23, "live", 0]]),
    "a negative buffer": (3, [["b", "bfloat16", -1, "live", 0]]),
    "one name for two buffers": (3, [["b", "bfloat16", 30, "live", 0], ["b", "bfloat16", 30, "live", 0]]),
    "a group that is not there": (3, [["b", "bfloat16", 30, "live", 1]]),
    "a fill outside": (4, [["b", 29, [2], [1], 0.0]]),
    "a fill of no buffer": (4, [["c", 0, [2], [1], 0.0]]),
    "a fill of two lengths": (4, [["b", 0, [2, 2], [1], 0.0]]),
    "no scratch slot": (7, 0),
    "a width that is too large": (8, 2**62),
    "a negative width": (8, -1),
    "a width of nothing": (8, 0),
    "missing columns": (9, {}),
}
COLUMNS = {
    "tensor": [[1], [-1], [], [0, 0]],
    "buffer": [[1], [-1], []],
    "offset": [[-1], [7], [2**62], []],
    "factors": [[4, 6], [0, 0], [-6, -4], [24], [2**62, 2**62], []],
    "lo": [[6, 0], [-1, 0], [-(2**62), 0]],
    "hi": [[7, 4], [0, 4], [2**62, 4]],
    "strides": [[-4, 1], [5, 3], [2**62, 1], [4]],
}


def record_of(layout: Layout) -> list[object]:
    return msgspec.msgpack.decode(layout.encoded)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_with_a_wrong_field_is_a_record_error(damage: str) -> None:
    record = record_of(variant())
    position, value = DAMAGE[damage]
    assert record[position] != value
    record[position] = value
    with pytest.raises(RecordError):
        Layout.decode(msgspec.msgpack.encode(record))


@pytest.mark.parametrize(("column", "values"), [(name, values) for name, every in COLUMNS.items() for values in every])
def test_a_record_with_a_wrong_column_is_a_record_error(column: str, values: list[int]) -> None:
    record = record_of(variant())
    record[9][column] = np.array(values, dtype="<i8").tobytes()
    with pytest.raises(RecordError):
        Layout.decode(msgspec.msgpack.encode(record))


def test_a_column_of_broken_numbers_is_a_record_error() -> None:
    record = record_of(variant())
    record[9]["lo"] = record[9]["lo"][:-1]
    with pytest.raises(RecordError, match="piece table is damaged"):
        Layout.decode(msgspec.msgpack.encode(record))


def test_fields_that_later_versions_add_are_passed_over() -> None:
    plain = record_of(variant())  # without what nobody says of any tensor
    record = [*plain, [], [], [], "from the future"]
    assert Layout.decode(msgspec.msgpack.encode(record)) == variant()


@pytest.mark.trap(13)
def test_a_tied_name_is_no_tensor_of_its_own() -> None:
    builder = LayoutBuilder()
    for name in ("embed", "head"):
        builder.tensor(name, (2,), "float32")
        builder.buffer(name, "float32", 2, group="g")
        builder.shard(name, name)
    builder.tie("head", "embed")
    with pytest.raises(LayoutError, match="head: tied to embed and declared as a tensor of its own"):
        builder.build()
