"""Whatever the model and the meshes: a plan moves each element to where an independent slice puts it, or says why."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.box import Affine, Box
from weft.errors import PlanError
from weft.layout import ITEM_BYTES, Int64s, Layout, LayoutBuilder
from weft.member import Member
from weft.naive import (
    Bits,
    all_ties,
    elements_of,
    expected_memory,
    fill_elements,
    naive_copies,
    naive_faults,
    poisoned_memory,
)
from weft.plan import Plan, plan
from weft.policy import Policy
from weft.testing.models import Case, Rank, random_case

seeds = st.integers(0, 2**32 - 1)


def case_of(seed: int) -> Case:
    return random_case(Random(seed))


def plan_of(case: Case, policy: Policy | None = None) -> Plan:
    return plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)


def nest(start: int, sizes: Int64s, strides: Int64s) -> Int64s:
    """Every index of a loop nest, in its order."""
    index = np.array([start], dtype=np.int64)
    for size, stride in zip(sizes.tolist(), strides.tolist(), strict=True):
        index = (index[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return index


@dataclasses.dataclass(frozen=True)
class Moved:
    """One copy of a plan, spelled out."""

    source: str
    source_buffer: str
    source_elements: Int64s
    target: str
    target_buffer: str
    target_elements: Int64s
    tensor: str
    indices: Int64s
    counted: bool


def moves(planned: Plan, layouts: Mapping[str, Layout]) -> list[Moved]:
    copies = planned.copies
    spelled: list[Moved] = []
    for n in range(len(copies)):
        source, target = planned.members[copies.source[n]], planned.members[copies.target[n]]
        sizes = copies.sizes[n]
        spelled.append(
            Moved(
                source.name,
                layouts[source.source_layout].buffers[copies.source_buffer[n]].name,
                nest(int(copies.source_offset[n]), sizes, copies.source_strides[n]),
                target.name,
                layouts[target.target_layout].buffers[copies.target_buffer[n]].name,
                nest(int(copies.target_offset[n]), sizes, copies.target_strides[n]),
                planned.tensors[copies.tensor[n]].name,
                nest(int(copies.logical_start[n]), sizes, copies.logical_strides[n]),
                bool(copies.counted[n]),
            )
        )
    return spelled


def execute(planned: Plan, case: Case, source_memory: Mapping[str, Mapping[str, Bits]]) -> dict[str, dict[str, Bits]]:
    """Replay a plan in this process, element by element, into poisoned target memory."""
    target_memory = {rank.member.name: poisoned_memory(rank.layout) for rank in case.targets}
    for move in moves(planned, case.layouts):
        found = source_memory[move.source][move.source_buffer][move.source_elements]
        target_memory[move.target][move.target_buffer][move.target_elements] = found
    return target_memory


def differences(
    memory: Mapping[str, Mapping[str, Bits]], expected: Mapping[str, Mapping[str, Bits]]
) -> list[tuple[str, str]]:
    assert {m: list(b) for m, b in memory.items()} == {m: list(b) for m, b in expected.items()}
    return [
        (member, buffer)
        for member, buffers in expected.items()
        for buffer, bits in buffers.items()
        if bits.tobytes() != memory[member][buffer].tobytes()
    ]


@given(seeds)
@settings(max_examples=150, deadline=None)
@pytest.mark.trap(1, 3, 4, 5, 8, 9, 13, 14, 72)
def test_every_byte_is_what_an_independent_slice_gives(seed: int) -> None:
    """Padding keeps its poison: a plan writes pieces and nothing beside them."""
    case = case_of(seed)
    values = case.values(seed)
    memory = execute(plan_of(case), case, {r.member.name: expected_memory(values, r.layout) for r in case.sources})
    assert differences(memory, {r.member.name: r.assigned(values) for r in case.targets}) == []


@given(seeds)
@settings(max_examples=60, deadline=None)
@pytest.mark.trap(1, 3, 9, 10)
def test_every_element_is_written_once_by_a_member_that_holds_it(seed: int) -> None:
    case = case_of(seed)
    planned = plan_of(case)
    sources = {r.member.name: r.layout for r in case.sources}
    targets = {r.member.name: r.layout for r in case.targets}
    ties = all_ties(sources, targets)
    holders: dict[tuple[str, str, int], list[str]] = {}
    for (member, tensor, index), names in naive_copies(sources, targets).items():
        holders[member, ties.get(tensor, tensor), index] = names
    written: Counter[tuple[str, str, int]] = Counter()
    for move in moves(planned, case.layouts):
        assert len(move.source_elements) == len(move.target_elements) == len(move.indices)
        written.update((move.target, move.target_buffer, element) for element in move.target_elements.tolist())
        for index in move.indices.tolist():
            assert move.source in holders[move.target, move.tensor, index]
    wanted = Counter(
        (member, piece.buffer, element)
        for member, layout in targets.items()
        for piece in layout
        for element in elements_of(piece)[1].tolist()
    )
    assert written == wanted
    assert set(wanted.values()) == {1}


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_each_replica_counts_every_logical_element_once(seed: int) -> None:
    """A version's digest does not depend on layouts: copies stand for distinct elements, and for all of them."""
    case = case_of(seed)
    planned = plan_of(case)
    replicas = {rank.member.name: rank.member.replica for rank in case.targets}
    counted: Counter[tuple[str | None, str, int]] = Counter()
    for move in moves(planned, case.layouts):
        if move.counted:
            counted.update((replicas[move.target], move.tensor, index) for index in move.indices.tolist())
    numels = {tensor.name: tensor.numel for tensor in case.tensors}
    every = [(r, name, n) for r in set(replicas.values()) for name, numel in numels.items() for n in range(numel)]
    assert counted == Counter(every)


@given(seeds)
@settings(max_examples=60, deadline=None)
@pytest.mark.trap(10)
def test_statistics_are_the_sums_of_what_moves(seed: int) -> None:
    case = case_of(seed)
    planned = plan_of(case)
    size = {tensor.name: ITEM_BYTES[tensor.target_dtype] for tensor in planned.tensors}
    egress: Counter[str] = Counter()
    ingress: Counter[str] = Counter()
    local = 0
    peers: dict[str, set[str]] = {member.name: set() for member in planned.members}
    for move in moves(planned, case.layouts):
        nbytes = len(move.indices) * size[move.tensor]
        egress[move.source] += nbytes
        ingress[move.target] += nbytes
        local += nbytes if move.source == move.target else 0
        peers[move.source].add(move.target)
        peers[move.target].add(move.source)
    statistics = planned.statistics
    assert statistics.bytes == egress.total() == ingress.total()
    assert Counter(statistics.egress_bytes) == egress
    assert Counter(statistics.ingress_bytes) == ingress
    assert statistics.local_bytes == local
    assert statistics.peers == {name: len(others - {name}) for name, others in peers.items()}


def columns(planned: Plan) -> dict[str, bytes]:
    copies = planned.copies
    return {field.name: getattr(copies, field.name).tobytes() for field in dataclasses.fields(copies)}


@given(seeds)
@settings(max_examples=60, deadline=None)
@pytest.mark.trap(18, 73)
def test_the_plan_is_equal_on_every_member(seed: int) -> None:
    """Whatever the order of members, of layouts, and whatever life of the peers they have heard of."""
    case = case_of(seed)
    first = plan_of(case)
    random = Random(seed)
    sources = [msgspec.structs.replace(r.member, incarnation=random.randint(1, 9)) for r in case.sources]
    targets = [msgspec.structs.replace(r.member, memory_epoch=random.randint(1, 9)) for r in case.targets]
    layouts = list(case.layouts.items())
    for each in (sources, targets, layouts):
        random.shuffle(each)
    decoded = {address: Layout.decode(layout.encoded) for address, layout in layouts}
    second = plan(sources, targets, decoded, Policy())
    assert second.fingerprint == first.fingerprint
    assert second.members == first.members
    assert second.tensors == first.tensors
    assert columns(second) == columns(first)


# What goes wrong -----------------------------------------------------------------------------------------------------


def rebuilt(layout: Layout, *, drop: int = -1, shift: int = -1, grow: int = -1, **renamed: str) -> Layout:
    """The same layout with one piece dropped, or moved on by one in its tensor (`shift`) or in its buffer (`grow`).

    `renamed` maps names of tensors to others. Pieces that would leave their tensor or buffer stay as they are.
    """
    builder = LayoutBuilder()
    for tensor in layout.tensors:
        builder.tensor(renamed.get(tensor.name, tensor.name), tensor.shape, tensor.dtype)
    for buffer in layout.buffers:
        builder.buffer(buffer.name, buffer.dtype, buffer.numel, group=layout.groups[buffer.group], kind=buffer.kind)
    numels = {buffer.name: buffer.numel for buffer in layout.buffers}
    for n, piece in enumerate(layout):
        box, offset = piece.box, piece.offset
        if n == drop:
            continue
        if n == shift:
            axis = next((a for a, high in enumerate(box.hi) if high < box.factors[a]), None)
            if axis is not None:
                lo, hi = list(box.lo), list(box.hi)
                lo[axis], hi[axis] = lo[axis] + 1, hi[axis] + 1
                box = Box(box.factors, tuple(lo), tuple(hi))
        if n == grow and int(elements_of(piece)[1].max()) + 1 < numels[piece.buffer]:
            offset += 1
        builder.piece(renamed.get(piece.tensor, piece.tensor), box, piece.buffer, offset, piece.strides)
    for fill in layout.fills:
        builder.fill(fill.buffer, fill.offset, fill.sizes, fill.strides, fill.value)
    for tie in layout.ties:
        builder.tie(tie.alias, renamed.get(tie.name, tie.name))
    return builder.build()


def changed(ranks: tuple[Rank, ...], number: int, layout: Layout) -> tuple[Rank, ...]:
    rank = ranks[number]
    field = "source_layout" if rank.member.is_source else "target_layout"
    member = msgspec.structs.replace(rank.member, **{field: layout.address})
    return (*ranks[:number], Rank(member, layout, ()), *ranks[number + 1 :])


def broken(random: Random, case: Case) -> Case:
    """A case with one thing changed; often it has no plan any more."""
    side = random.choice(("sources", "targets"))
    ranks: tuple[Rank, ...] = getattr(case, side)
    holding = [n for n, rank in enumerate(ranks) if len(rank.layout.pieces)]
    if not holding:
        return case
    number = random.choice(holding)
    layout = ranks[number].layout
    piece = random.randrange(len(layout.pieces))
    how = random.choice(("drop", "shift", "grow", "rename", "remove"))
    if how == "remove":
        return dataclasses.replace(case, **{side: (*ranks[:number], *ranks[number + 1 :])})
    if how == "rename":
        return dataclasses.replace(
            case, **{side: changed(ranks, number, rebuilt(layout, **{list(layout)[piece].tensor: "another"}))}
        )
    return dataclasses.replace(case, **{side: changed(ranks, number, rebuilt(layout, **{how: piece}))})


@given(seeds)
@settings(max_examples=250, deadline=None)
@pytest.mark.trap(1, 3, 11, 12, 13)
def test_there_is_a_plan_exactly_when_the_naive_planner_finds_no_fault(seed: int) -> None:
    random = Random(seed)
    case = broken(random, case_of(seed))
    sources = {r.member.name: r.layout for r in case.sources}
    targets = {r.member.name: r.layout for r in case.targets}
    faults = naive_faults(sources, targets)
    if not faults:
        assert len(plan_of(case).copies)
        return
    with pytest.raises(PlanError) as caught:
        plan_of(case)
    ties = all_ties(sources, targets)
    for kind, member, where in faults:
        said = [fault for fault in caught.value.faults if where in fault or ties.get(where, where) in fault]
        assert kind == "empty" or said, f"{(kind, member, where)} is not in {caught.value}"


# By hand -------------------------------------------------------------------------------------------------------------


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
    memory = execute(plan_of(case), case, {r.member.name: expected_memory(values, r.layout) for r in case.sources})
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
    memory = execute(plan_of(case), case, {"trainer/0": expected_memory(values, case.sources[0].layout)})
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
    memory = execute(plan_of(case), case, {"trainer/0": expected_memory(values, case.sources[0].layout)})
    assert memory["rollout0/0"]["b"][:48].tolist() == list(range(1, 49))
    assert set(memory["rollout0/0"]["b"][48:].tolist()) <= {0xA5A5}


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


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_fills_and_pieces_of_a_target_make_up_all_of_its_memory(seed: int) -> None:
    """The generator's own promise, without which the tests above would compare less than they say."""
    for rank in case_of(seed).targets:
        times = Counter(
            [(piece.buffer, n) for piece in rank.layout for n in elements_of(piece)[1].tolist()]
            + [(fill.buffer, n) for fill in rank.layout.fills for n in fill_elements(fill).tolist()]
        )
        every = {(buffer.name, n) for buffer in rank.layout.buffers for n in range(buffer.numel)}
        assert times == Counter(every)
