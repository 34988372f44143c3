"""Formats of tensors and what is said of them: in layouts, through records, and between the two sides."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch

from weft.agreement import acceptable
from weft.builder import LayoutBuilder
from weft.compare import Reference, compare
from weft.errors import LayoutError, PlanError, RecordError
from weft.formats import CHECKPOINT, Acceptance, Format, refusal
from weft.layout import Layout
from weft.member import Member
from weft.plan import plan
from weft.policy import Policy
from weft.verification import State, verdict

PACKED = Format("packed", {"isa": "avx512", "block": "16"})


def layout(
    formats: dict[str, Format] | None = None,
    accepts: dict[str, dict[str, tuple[str, ...]]] | None = None,
    *,
    shapes: dict[str, tuple[int, int]] | None = None,
    dtypes: dict[str, str] | None = None,
    held: dict[str, int] | None = None,
    extra: dict[str, dict[str, str]] | None = None,
) -> Layout:
    """Tensors `a` and `b`, of 4 × 2 float32 where nothing else is said; of `held` only so many rows."""
    builder = LayoutBuilder()
    for name in shapes or ("a", "b"):
        shape, dtype = (shapes or {}).get(name, (4, 2)), (dtypes or {}).get(name, "float32")
        rows = (held or {}).get(name, shape[0])
        builder.tensor(name, shape, dtype, format=(formats or {}).get(name, CHECKPOINT), extra=(extra or {}).get(name))
        builder.buffer(name, dtype, rows * shape[1], group="g")
        builder.shard(name, name, stop=rows)
    for name, metadata in (accepts or {}).items():
        builder.accept(name, metadata)
    return builder.build()


def planned(source: Layout, target: Layout, policy: Policy | None = None) -> tuple[str, ...]:
    """The faults of a plan of one source and one target."""
    members = [
        Member("trainer", source.address, None, None, 0, "h", "d", "cpu"),
        Member("rollout", None, target.address, "r", 1, "h", "d", "cpu"),
    ]
    try:
        plan(members[:1], members[1:], {each.address: each for each in (source, target)}, policy)
    except PlanError as error:
        return error.faults
    return ()


def test_what_nobody_says_takes_no_byte() -> None:
    plain = layout()
    assert len(msgspec.msgpack.decode(plain.encoded)) == 10
    assert plain.encoded == layout({"a": CHECKPOINT}, extra={"a": {}}).encoded
    few = replace(plain, extra={"b": {"k": "v"}})
    assert len(few.encoded) - len(plain.encoded) < 16


def test_formats_and_extras_survive_the_record() -> None:
    made = layout(
        {"b": PACKED, "a": PACKED}, {"packed": {"isa": ("avx2",), "block": ()}}, extra={"b": {"z": "1", "y": "2"}}
    )
    found = Layout.decode(made.encoded)
    assert (found.formats, found.accepts, found.extra) == (made.formats, made.accepts, made.extra)
    assert found.formats == {"a": PACKED, "b": PACKED}
    assert found.accepts == (Acceptance("packed", {"isa": ("avx2",), "block": ()}),)
    assert found.extra == {"b": {"z": "1", "y": "2"}}
    assert found.encoded == made.encoded


def test_the_order_in_which_things_are_said_does_not_matter() -> None:
    other = Format("packed", {"block": "16", "isa": "avx512"})
    assert (other, hash(other)) == (PACKED, hash(PACKED))
    one = replace(layout(), formats={"a": PACKED, "b": PACKED}, extra={"a": {"x": "1", "y": "2"}, "b": {"z": "3"}})
    same = replace(layout(), formats={"b": other, "a": other}, extra={"b": {"z": "3"}, "a": {"y": "2", "x": "1"}})
    assert one.address == same.address


def test_a_format_and_an_extra_are_part_of_the_address() -> None:
    made = [layout(), layout({"a": PACKED}), layout({"a": Format("packed")}), layout(extra={"a": {"k": "v"}})]
    made.append(layout(accepts={"packed": {}}))
    assert len({each.address for each in made}) == len(made)


def test_a_reader_that_would_overlook_formats_does_not_try() -> None:
    for made, version in (
        (layout({"a": PACKED}), 2),
        (layout(accepts={"packed": {}}), 2),
        (layout(extra={"a": {"k": "v"}}), 1),
    ):
        assert msgspec.msgpack.decode(made.encoded)[0] == version


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (10, [[["packed", {}], [2]]]),
        (10, [[["packed", {}], [-1]]]),
        (10, [[["packed", {}], [0, 0]]]),
        (10, [[["packed", {}], [0]], [["other", {}], [0]]]),
        (10, [[["", {}], [0]]]),
        (10, [[["packed", {"k": 1}], [0]]]),
        (10, [[["checkpoint", {"k": "v"}], [0]]]),
        (11, [["", {}]]),
        (11, [["packed", {"k": "v"}]]),
        (12, [[2, {"k": "v"}]]),
        (12, [[0, {"k": "v"}], [0, {"k": "v"}]]),
        (12, [[0, {"k": 1}]]),
    ],
)
def test_a_damaged_description_is_a_record_error(at: int, value: object) -> None:
    record = [*msgspec.msgpack.decode(layout().encoded), [], [], []]
    Layout.decode(msgspec.msgpack.encode(record))
    record[at] = value
    with pytest.raises(RecordError):
        Layout.decode(msgspec.msgpack.encode(record))


def test_a_builder_lists_what_contradicts_itself() -> None:
    builder = LayoutBuilder()
    builder.tensor("a", (2,), "float32", format=PACKED, extra={"k": "v"})
    builder.tensor("a", (2,), "float32", format=PACKED, extra={"k": "v"})
    builder.tensor("a", (2,), "float32")
    builder.tensor("b", (2,), "float32", format=Format(""))
    builder.tensor("c", (2,), "float32", format=Format("checkpoint", {"k": "v"}))
    builder.accept("")
    with pytest.raises(LayoutError) as caught:
        builder.build()
    assert caught.value.faults == (
        "a: declared in format packed (block=16, isa=avx512) and in checkpoint",
        "a: declared with extra {'k': 'v'} and with {}",
        "b: a format needs a name",
        "c: format checkpoint (k=v): what is as on disk has no metadata; give the format a name of its own",
        "a format that is accepted needs a name",
    )


@pytest.mark.parametrize(
    ("offered", "own", "accepts", "reason"),
    [
        (CHECKPOINT, CHECKPOINT, [], ""),
        (PACKED, PACKED, [], ""),
        (PACKED, CHECKPOINT, [], "accepted: checkpoint"),
        (CHECKPOINT, PACKED, [], "accepted: packed"),
        (CHECKPOINT, PACKED, [Acceptance("checkpoint")], ""),
        (PACKED, CHECKPOINT, [Acceptance("swizzled")], "accepted: checkpoint, swizzled"),
        (PACKED, CHECKPOINT, [Acceptance("packed", {"isa": ("avx2", "avx512"), "block": ()})], ""),
        (
            PACKED, CHECKPOINT, [Acceptance("packed", {"isa": ("avx2",), "tile": ()})],
            "block is '16', accepted without it, isa is 'avx512', accepted: 'avx2', tile is missing, accepted: any",
        ),
        (
            PACKED, Format("packed", {"isa": "avx512"}), [Acceptance("packed", {"isa": ("neon", "sve"), "block": ()})],
            "block is '16', accepted without it; or isa is 'avx512', accepted: 'neon' or 'sve'",
        ),
        (PACKED, Format("packed"), [Acceptance("packed", {"isa": ("avx512",), "block": ("16", "32")})], ""),
    ],
)  # fmt: skip
def test_a_target_takes_its_own_format_and_those_it_accepts(
    offered: Format, own: Format, accepts: list[Acceptance], reason: str
) -> None:
    assert refusal(offered, own, accepts) == reason


def test_a_tensor_in_a_format_that_is_not_accepted_is_not_planned() -> None:
    accepts = {"packed": {"isa": ("avx512",), "block": ()}}
    assert planned(layout({"a": PACKED}), layout({"a": PACKED})) == ()
    assert planned(layout({"a": PACKED}), layout(accepts=accepts)) == ()
    assert planned(layout({"a": PACKED}), layout()) == (
        "a: source trainer holds it in format packed (block=16, isa=avx512), which target rollout does not accept "
        "(accepted: checkpoint)",
    )
    assert len(planned(layout(), layout({"a": PACKED, "b": PACKED}))) == 2


def test_sources_that_hold_one_tensor_in_two_formats_contradict_each_other() -> None:
    faults = acceptable(
        {"t/0": layout({"a": PACKED}), "t/1": layout()}, layout(accepts={"packed": {"isa": (), "block": ()}})
    )
    assert faults == ["a: source t/0 holds it in format packed (block=16, isa=avx512), source t/1 in checkpoint"]


def test_the_format_of_a_tied_tensor_is_that_of_its_name() -> None:
    builder = LayoutBuilder()
    builder.tensor("head", (4, 2), "float32")
    builder.buffer("head", "float32", 8, group="g")
    builder.shard("head", "head")
    builder.tie("lm", "head")
    source = replace(builder.build(), formats={"head": PACKED})
    target = replace(layout(shapes={"lm": (4, 2)}), formats={})
    assert [fault.partition(":")[0] for fault in planned(source, target)] == ["head"]
    assert planned(source, replace(target, formats={"lm": PACKED})) == ()


def test_what_does_not_move_may_be_in_any_format() -> None:
    assert planned(layout({"a": PACKED}), layout(), Policy(only=("b",))) == ()


def test_everything_that_is_wrong_is_listed_at_once() -> None:
    shapes = {"format": (4, 2), "metadata": (4, 2), "axes": (4, 2), "dtype": (4, 2), "half": (4, 2), "surplus": (4, 2)}
    source = layout(
        {"format": PACKED, "metadata": PACKED}, shapes=shapes, dtypes={"dtype": "bfloat16"}, held={"half": 2}
    )
    del shapes["surplus"]
    target = layout(
        {"metadata": Format("packed", {"isa": "neon", "block": "16"})},
        shapes={**shapes, "axes": (2, 4), "missing": (4, 2)},
    )
    faults = planned(source, target)
    assert sorted(fault.partition(":")[0] for fault in faults) == sorted({*shapes, "surplus", "missing"})
    assert list(faults) == [each.replace("here", "rollout") for each in acceptable({"trainer": source}, target)]


def test_a_candidate_is_taken_whole_or_not_at_all() -> None:
    halves = {"r/0": layout(held={"a": 2}), "r/1": layout()}
    assert acceptable(halves, layout()) == []
    assert acceptable({"r/0": layout(held={"a": 2})}, layout()) != []
    assert acceptable({**halves, "r/2": None}, layout()) == ["r/2: without a layout"]
    assert acceptable({"r/0": None}, layout()) == ["r/0: without a layout"]
    assert acceptable({}, layout()) == ["nobody offers anything"]
    assert acceptable({"r/0": layout(shapes={"a": (4, 2), "b": (4, 2), "c": (4, 2)})}, layout()) != []
    assert (
        acceptable({"r/0": layout(shapes={"a": (4, 2), "b": (4, 2), "c": (4, 2)})}, layout(), Policy(ignore=("c",)))
        == []
    )


def test_what_is_not_as_on_disk_is_not_taken_for_wrong_and_not_for_right() -> None:
    whole = {name: torch.randn(4, 2) for name in ("a", "b")}
    memory = {"a": whole["a"].t().contiguous().view(-1), "b": whole["b"].view(-1)}
    reference, policy = Reference(whole, {}), Policy()
    found = verdict({"rank": compare(layout({"a": PACKED}), memory, reference, policy)}, reference, policy)
    assert [(each.name, each.state) for each in found.tensors] == [("a", State.NOT_COMPARED), ("b", State.EQUAL)]
    assert "it is in format packed (block=16, isa=avx512), which only its engine can read" in found.tensors[0].reason
    assert found.failures()
    assert not found.failures(partial=True)
