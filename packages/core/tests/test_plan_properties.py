"""Whatever the model and the meshes: a plan moves each element to where an independent slice puts it, or says why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from random import Random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.box import Box
from weft.builder import LayoutBuilder
from weft.errors import PlanError
from weft.layout import ITEM_BYTES, Int64s, Layout
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
from weft.views import execute as execute_plan
from weft.views import torch_dtype

seeds = st.integers(0, 2**32 - 1)


CUTTING = Policy(least_cut_bytes=8)
"""The cases are small; with this, copies are divided between senders in some of them."""


def case_of(seed: int) -> Case:
    return random_case(Random(seed))


def plan_of(case: Case, policy: Policy = CUTTING) -> Plan:
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


def torch_memory(layout: Layout, memory: Mapping[str, Bits]) -> dict[str, torch.Tensor]:
    """The same memory as tensors that share it."""
    dtypes = {buffer.name: torch_dtype(buffer.dtype) for buffer in layout.buffers}
    return {name: torch.from_numpy(bits.view(np.uint8)).view(dtypes[name]) for name, bits in memory.items()}


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
@settings(max_examples=1000, deadline=None)
@pytest.mark.trap(1, 3, 4, 5, 8, 9, 13, 14, 72)
def test_every_byte_is_what_an_independent_slice_gives(seed: int) -> None:
    """Padding keeps its poison: a plan writes pieces and nothing beside them."""
    case = case_of(seed)
    values = case.values(seed)
    memory = execute(plan_of(case), case, {r.member.name: expected_memory(values, r.layout) for r in case.sources})
    assert differences(memory, {r.member.name: r.assigned(values) for r in case.targets}) == []


@given(seeds)
@settings(max_examples=60, deadline=None)
@pytest.mark.trap(14, 69)
def test_the_executor_of_one_process_leaves_what_an_independent_slice_gives(seed: int) -> None:
    case = case_of(seed)
    values = case.values(seed)
    expected = {r.member.name: expected_memory(values, r.layout) for r in (*case.sources, *case.targets)}
    sources = {r.member.name: torch_memory(r.layout, expected[r.member.name]) for r in case.sources}
    memory = {r.member.name: poisoned_memory(r.layout) for r in case.targets}
    targets = {r.member.name: torch_memory(r.layout, memory[r.member.name]) for r in case.targets}
    execute_plan(plan_of(case), case.layouts, sources, targets)
    assert differences(memory, {name: expected[name] for name in memory}) == []


@given(seeds)
@settings(max_examples=500, deadline=None)
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
@settings(max_examples=200, deadline=None)
def test_copies_to_a_member_are_in_the_order_of_its_groups_and_buffers(seed: int) -> None:
    copies = plan_of(case_of(seed)).copies
    places = [copies.target, copies.group, copies.target_buffer]
    assert np.lexsort(places[::-1]).tolist() == list(range(len(copies)))


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
    hosts = {member.name: member.host for member in planned.members}
    far = [move for move in moves(planned, case.layouts) if hosts[move.source] != hosts[move.target]]
    assert statistics.cross_host_bytes == sum(len(move.indices) * size[move.tensor] for move in far)
    boxes = {(hosts[m.target], m.tensor, *sorted(m.indices.tolist())): len(m.indices) * size[m.tensor] for m in far}
    assert statistics.once_per_host_bytes == sum(boxes.values())
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
    second = plan(sources, targets, decoded, CUTTING)
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
@settings(max_examples=1000, deadline=None)
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
