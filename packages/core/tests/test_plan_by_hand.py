"""Plans of cases small enough to say what must come out: faults by name, copies by number, senders by bytes."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
import torch

from weft.box import Affine
from weft.builder import LayoutBuilder
from weft.errors import PlanError
from weft.layout import Layout
from weft.member import Member
from weft.naive import Bits, expected_memory, poisoned_memory
from weft.plan import Plan, plan
from weft.policy import Policy
from weft.testing.models import Case, Rank
from weft.views import execute, torch_dtype


def plan_of(case: Case, policy: Policy | None = None) -> Plan:
    return plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)


def moved(case: Case, values: dict[str, Bits], policy: Policy | None = None) -> dict[str, dict[str, Bits]]:
    """Bits of every target's buffers after the plan was carried out into poison; `values` are the sources' bits."""

    def tensors(rank: Rank, memory: dict[str, Bits]) -> dict[str, torch.Tensor]:
        dtypes = {buffer.name: torch_dtype(buffer.dtype) for buffer in rank.layout.buffers}
        return {name: torch.from_numpy(bits.view(np.uint8)).view(dtypes[name]) for name, bits in memory.items()}

    memory = {r.member.name: poisoned_memory(r.layout) for r in case.targets}
    sources = {r.member.name: tensors(r, expected_memory(values, r.layout)) for r in case.sources}
    targets = {r.member.name: tensors(r, memory[r.member.name]) for r in case.targets}
    execute(plan_of(case, policy), case.layouts, sources, targets)
    return memory


def member(name: str, *, source: Layout | None = None, target: Layout | None = None, host: str = "host0") -> Member:
    return Member(
        name, source.address if source else None, target.address if target else None,
        name if target else None, 1, host, host, "cpu",
    )  # fmt: skip


def sides(sources: list[Layout], targets: list[Layout]) -> Case:
    return Case(
        (), {},
        tuple(Rank(member(f"trainer/{n}", source=layout), layout, ()) for n, layout in enumerate(sources)),
        tuple(Rank(member(f"rollout{n}/0", target=layout), layout, ()) for n, layout in enumerate(targets)),
    )  # fmt: skip


def rows(
    low: int, high: int, *, shape=(12, 4), dtype: str = "bfloat16", name: str = "w", numel: int | None = None
) -> Layout:
    """Rows low:high of one tensor, dense in a buffer."""
    builder = LayoutBuilder()
    builder.tensor(name, shape, dtype)
    builder.buffer("b", dtype, (high - low) * shape[1] if numel is None else numel, group="g")
    builder.shard(name, "b", start=low, stop=high)
    return builder.build()


def error_of(case: Case, policy: Policy | None = None) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan_of(case, policy)
    return caught.value


def chunks(length: int, ranks: int) -> list[tuple[int, int]]:
    step = -(-length // ranks)
    return [(min(r * step, length), min((r + 1) * step, length)) for r in range(ranks)]


@pytest.mark.trap(1, 3)
@pytest.mark.parametrize(("before", "after"), list(itertools.product((1, 2, 3, 8), repeat=2)))
@pytest.mark.parametrize("length", [24, 25, 5])
def test_tensor_parallel_sizes_with_and_without_a_remainder(length: int, before: int, after: int) -> None:
    shape = (length, 4)
    case = sides(*([rows(low, high, shape=shape) for low, high in chunks(length, tp)] for tp in (before, after)))
    values = {"w": np.arange(length * 4, dtype=np.uint16).reshape(shape)}
    memory = moved(case, values)
    for rank, (low, high) in zip(case.targets, chunks(length, after), strict=True):
        assert memory[rank.member.name]["b"].tolist() == values["w"][low:high].ravel().tolist()


@pytest.mark.trap(1, 3, 12)
def test_a_hole_is_named_by_tensor_member_and_box() -> None:
    error = error_of(sides([rows(0, 5), rows(6, 12)], [rows(0, 4), rows(4, 12)]))
    assert len(error.faults) == 1
    for part in ("w: ", "rollout1/0", "[5:6, 0:4] of (12, 4)", "held by no source"):
        assert part in error.faults[0]


@pytest.mark.trap(8, 9)
def test_a_hole_is_named_where_sources_overlap_as_well() -> None:
    """Elements that two sources hold must not make up for one that nobody does."""
    error = error_of(sides([rows(0, 6), rows(5, 11)], [rows(0, 12)]))
    assert len(error.faults) == 1
    for part in ("w: ", "rollout0/0", "[11:12, 0:4] of (12, 4)", "held by no source"):
        assert part in error.faults[0]


@pytest.mark.trap(8, 9)
def test_overlapping_sources_give_every_element_once() -> None:
    case = sides([rows(0, 7), rows(5, 12), rows(0, 12)], [rows(0, 12), rows(3, 9)])
    planned = plan_of(case)
    assert planned.statistics.bytes == (12 + 6) * 4 * 2
    assert planned.copies.numel.sum() == (12 + 6) * 4


@pytest.mark.trap(12)
def test_a_side_without_members_is_an_error() -> None:
    for case in (sides([], [rows(0, 12)]), sides([rows(0, 12)], []), sides([], [])):
        assert "both are needed" in str(error_of(case))


@pytest.mark.trap(12)
def test_a_plan_without_copies_is_an_error() -> None:
    nothing = LayoutBuilder().build()
    assert "no copies" in str(error_of(sides([nothing], [nothing])))


@pytest.mark.trap(12, 13)
def test_names_on_one_side_only_are_errors() -> None:
    error = error_of(sides([rows(0, 12), rows(0, 12, name="extra")], [rows(0, 12), rows(0, 12, name="wanted")]))
    text = str(error)
    assert "wanted: wanted by target rollout1/0, held by no source" in text
    assert "extra: held by source trainer/1, wanted by no target" in text


@pytest.mark.trap(13)
def test_a_source_tensor_may_be_ignored_on_purpose_only() -> None:
    case = sides([rows(0, 12), rows(0, 12, name="router.expert_bias")], [rows(0, 12)])
    assert "router.expert_bias" in str(error_of(case))
    assert plan_of(case, Policy(ignore=("*.expert_bias",))).statistics.bytes == 96


@pytest.mark.trap(11)
@pytest.mark.parametrize(
    ("held", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_an_undeclared_difference_of_dtype_is_an_error(held: str, wanted: str) -> None:
    case = sides([rows(0, 12, dtype=held)], [rows(0, 12, dtype=wanted)])
    error = error_of(case)
    for part in ("w: ", "trainer/0", "rollout0/0", held, wanted):
        assert part in str(error)
    planned = plan_of(case, Policy(casts=((held, wanted),)))
    assert (planned.tensors[0].source_dtype, planned.tensors[0].target_dtype) == (held, wanted)
    assert "w: " in str(error_of(case, Policy(casts=((wanted, held),))))


@pytest.mark.trap(11, 14)
@pytest.mark.parametrize("shape", [(12, 3), (11, 4), (24, 2), (4, 12), (48, 1), (13, 4)])
def test_a_difference_of_shape_is_an_error(shape: tuple[int, int]) -> None:
    """Equal numbers of elements do not make equal shapes, and padding must be declared."""
    error = error_of(sides([rows(0, 12)], [rows(0, shape[0], shape=shape)]))
    for part in ("w: ", "trainer/0", "rollout0/0", "[12, 4]", str(list(shape))):
        assert part in str(error)


@pytest.mark.trap(6, 11)
def test_members_of_one_side_that_disagree_are_an_error() -> None:
    other = rows(0, 6, shape=(6, 4))
    for case in (sides([rows(0, 12), other], [rows(0, 12)]), sides([rows(0, 12)], [rows(0, 12), other])):
        text = str(error_of(case))
        assert "[12, 4]" in text
        assert "[6, 4]" in text


def test_memory_that_two_pieces_claim_is_an_error() -> None:
    builder = LayoutBuilder()
    builder.tensor("v", (2, 4), "bfloat16")
    builder.tensor("w", (12, 4), "bfloat16")
    builder.buffer("b", "bfloat16", 52, group="g")
    builder.shard("w", "b")
    builder.shard("v", "b", offset=44)
    both = LayoutBuilder()
    both.tensor("v", (2, 4), "bfloat16")
    both.tensor("w", (12, 4), "bfloat16")
    both.buffer("v", "bfloat16", 8, group="g")
    both.buffer("w", "bfloat16", 48, group="g")
    both.shard("v", "v")
    both.shard("w", "w")
    error = error_of(sides([both.build()], [builder.build()]))
    assert len(error.faults) == 1
    for part in ("rollout0/0", "buffer b", "v and w share memory"):
        assert part in error.faults[0]


@pytest.mark.trap(12, 69)
def test_memory_that_nobody_claims_is_an_error() -> None:
    error = error_of(sides([rows(0, 12)], [rows(0, 12, numel=50)]))
    for part in ("rollout0/0", "buffer b", "2 are claimed by none"):
        assert part in str(error)


def test_a_hole_and_an_overlap_of_equal_size_are_both_named() -> None:
    builder = LayoutBuilder()
    builder.tensor("w", (12, 4), "bfloat16")
    builder.buffer("b", "bfloat16", 48, group="g")
    builder.shard("w", "b", stop=6)
    builder.shard("w", "b", start=6, offset=20)  # 20:44: four elements twice, and 44:48 never
    error = error_of(sides([rows(0, 12)], [builder.build()]))
    assert "share memory" in str(error)
    assert "claim" in str(error)


def test_a_piece_with_gaps_does_not_pass_for_a_dense_one() -> None:
    builder = LayoutBuilder()
    builder.tensor("w", (12, 4), "bfloat16")
    builder.buffer("b", "bfloat16", 48, group="g")
    builder.view("w", Affine(0, (24,), (1,)), "b", Affine(0, (24,), (2,)))  # every second element of 0:47
    builder.view("w", Affine(24, (24,), (1,)), "b", Affine(24, (24,), (1,)))
    error = error_of(sides([rows(0, 12)], [builder.build()]))
    assert "share memory" in str(error)
    assert "12 are claimed by none" in str(error)


def test_one_element_that_is_claimed_twice_is_named() -> None:
    builder = LayoutBuilder()
    for name in ("scale", "other"):
        builder.tensor(name, (), "float32")
    builder.buffer("b", "float32", 1, group="g")
    builder.shard("scale", "b")
    builder.shard("other", "b")
    held = LayoutBuilder()
    for name in ("scale", "other"):
        held.tensor(name, (), "float32")
        held.buffer(name, "float32", 1, group="g")
        held.shard(name, name)
    error = error_of(sides([held.build()], [builder.build()]))
    assert "other and scale share memory" in str(error)


def test_every_fault_is_reported_at_once() -> None:
    builder = LayoutBuilder()
    for name, shape, dtype in (("a", (4,), "uint8"), ("b", (5,), "uint8"), ("c", (4,), "int8"), ("d", (4,), "uint8")):
        builder.tensor(name, shape, dtype)
        builder.buffer(name, dtype, shape[0], group="g")
        builder.shard(name, name)
    held = LayoutBuilder()
    for name, start in (("a", 1), ("b", 0), ("c", 0), ("e", 0)):
        held.tensor(name, (4,), "uint8")
        held.buffer(name, "uint8", 4 - start, group="g")
        held.shard(name, name, start=start)
    error = error_of(sides([held.build()], [builder.build()]))
    for name in "abcde":
        assert any(fault.startswith(f"{name}: ") for fault in error.faults), name
    assert len(error.faults) == 5


@pytest.mark.trap(20)
def test_a_strided_prefix_is_one_copy() -> None:
    builder = LayoutBuilder()
    builder.tensor("w", (1000, 64), "bfloat16")
    builder.buffer("b", "bfloat16", 13_000, group="g")
    builder.shard("w", "b", axis=1, stop=13)
    planned = plan_of(sides([rows(0, 1000, shape=(1000, 64))], [builder.build()]))
    assert len(planned.copies) == 1
    assert planned.copies.sizes.tolist() == [[1000, 13]]


@pytest.mark.trap(20, 72)
def test_alternating_columns_are_two_copies_per_rank() -> None:
    held, wanted = LayoutBuilder(), LayoutBuilder()
    held.tensor("gate_up", (64, 2000), "bfloat16")
    wanted.tensor("gate_up", (64, 2000), "bfloat16")
    held.buffer("b", "bfloat16", 128_000, group="g")
    wanted.buffer("b", "bfloat16", 128_000, group="g")
    held.shard("gate_up", "b")
    for half in (0, 1):  # rows of gate, then rows of up
        wanted.view("gate_up", Affine(half, (64, 1000), (2000, 2)), "b", Affine(half * 64_000, (64, 1000), (1, 64)))
    case = sides([held.build()], [wanted.build()])
    assert len(plan_of(case).copies) == 2


@pytest.mark.trap(10)
def test_equal_holders_share_the_sending() -> None:
    whole = LayoutBuilder()
    for name in (f"w{n}" for n in range(16)):
        whole.tensor(name, (64,), "bfloat16")
        whole.buffer(name, "bfloat16", 64, group=name)
        whole.shard(name, name)
    layout = whole.build()
    layouts = {layout.address: layout}
    sources = [member(f"trainer/{n}", source=layout) for n in range(4)]
    targets = [member(f"rollout{n}/0", target=layout, host="host1") for n in range(4)]
    statistics = plan(sources, targets, layouts).statistics
    assert set(statistics.egress_bytes.values()) == {16 * 64 * 2}
    assert statistics.egress_max_over_mean == 1.0


@pytest.mark.trap(18)
def test_the_fingerprint_follows_layouts_members_and_policy_but_no_addresses() -> None:
    whole, half, rest = rows(0, 12), rows(0, 6), rows(6, 12)
    layouts = {layout.address: layout for layout in (whole, half, rest)}

    def planned(sources: list[Member], targets: list[Member], policy: Policy | None = None) -> str:
        return plan(sources, targets, layouts, policy).fingerprint

    base = [member("trainer/0", source=whole)], [member("rollout0/0", target=whole)]
    first = planned(*base)
    assert planned([msgspec.structs.replace(base[0][0], incarnation=3, memory_epoch=4)], base[1]) == first
    others = [
        planned(base[0], [*base[1], member("rollout1/0", target=whole)]),
        planned([member("trainer/0", source=half), member("trainer/1", source=rest)], base[1]),
        planned(base[0], [member("rollout0/0", target=half)]),
        planned([member("trainer/1", source=whole)], base[1]),
        planned([member("trainer/0", source=whole, host="host1")], base[1]),
        planned(*base, Policy(bucket_bytes=8192)),
        planned([msgspec.structs.replace(base[0][0], device="cuda:0")], base[1]),
        planned(base[0], [msgspec.structs.replace(base[1][0], replica="rollout7")]),
    ]
    assert len({first, *others}) == len(others) + 1


@pytest.mark.trap(13)
def test_tied_names_are_fed_from_the_tensor_on_disk() -> None:
    source = LayoutBuilder()
    source.tensor("embed", (12, 4), "bfloat16")
    source.buffer("b", "bfloat16", 48, group="g")
    source.shard("embed", "b")
    source.tie("head", "embed")
    case = sides([source.build()], [rows(0, 12, name="embed"), rows(3, 9, name="head")])
    values = {"embed": np.arange(48, dtype=np.uint16).reshape(12, 4)}
    memory = moved(case, values)
    assert memory["rollout0/0"]["b"].tolist() == list(range(48))
    assert memory["rollout1/0"]["b"].tolist() == list(range(12, 36))


@pytest.mark.trap(13)
def test_a_target_that_ties_what_a_source_holds_apart_is_an_error() -> None:
    target = LayoutBuilder()
    target.tensor("embed", (12, 4), "bfloat16")
    target.buffer("b", "bfloat16", 48, group="g")
    target.shard("embed", "b")
    target.tie("head", "embed")
    error = error_of(sides([rows(0, 12, name="embed"), rows(0, 12, name="head")], [target.build()]))
    assert "head" in str(error)
    assert "trainer/1" in str(error)


@pytest.mark.trap(14)
@pytest.mark.parametrize(("held", "wanted"), [(16, 12), (12, 16), (14, 20)])
def test_padded_vocabularies_differ_in_padding_only(held: int, wanted: int) -> None:
    def padded(length: int) -> Layout:
        builder = LayoutBuilder()
        builder.tensor("w", (12, 4), "bfloat16")
        builder.buffer("b", "bfloat16", length * 4, group="g")
        builder.shard("w", "b")
        if length > 12:
            builder.fill("b", 48, ((length - 12) * 4,), (1,), 0.0)
        return builder.build()

    case = sides([padded(held)], [padded(wanted)])
    values = {"w": np.arange(1, 49, dtype=np.uint16).reshape(12, 4)}
    memory = moved(case, values)
    assert memory["rollout0/0"]["b"][:48].tolist() == list(range(1, 49))
    assert memory["rollout0/0"]["b"][48:].tolist() == [0] * (wanted - 12) * 4


def test_a_tensor_without_elements_moves_nothing_and_hurts_nobody() -> None:
    def layout() -> Layout:
        builder = LayoutBuilder()
        builder.tensor("w", (12, 4), "bfloat16")
        builder.tensor("nothing", (0, 4), "bfloat16")
        builder.buffer("b", "bfloat16", 48, group="g")
        builder.buffer("none", "bfloat16", 0, group="g")
        builder.shard("w", "b")
        builder.shard("nothing", "none")
        return builder.build()

    assert plan_of(sides([layout()], [layout()])).statistics.bytes == 96


def test_sources_with_equal_bytes_stay_on_the_member_that_is_both() -> None:
    """A collocated member feeds itself: nothing crosses a wire that need not."""
    layout = rows(0, 12)
    both = Member("worker/0", layout.address, layout.address, "rollout0", 1, "host0", "host0", "cpu")
    other = member("worker/1", source=layout)
    statistics = plan([both, other], [both], {layout.address: layout}).statistics
    assert statistics.local_bytes == statistics.bytes == 96


@pytest.mark.trap(11)
def test_a_declared_cast_rounds_to_nearest_even() -> None:
    """0x3F80_8000 lies halfway between bfloat16 0x3F80 and 0x3F81, 0x3F81_8000 between 0x3F81 and 0x3F82."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000000, 0x7F800000, 0x7F7FFFFF, 0x00000001]
    values = {"w": np.array(bits, dtype=np.uint32).reshape(2, 4)}
    case = sides([rows(0, 2, shape=(2, 4), dtype="float32")], [rows(0, 2, shape=(2, 4))])
    memory = moved(case, values, Policy(casts=(("float32", "bfloat16"),)))
    assert memory["rollout0/0"]["b"].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000, 0x7F80, 0x7F80, 0x0000]
