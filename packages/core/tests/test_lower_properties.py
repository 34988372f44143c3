"""Whatever the plan and the bounds: both ends lower it alike, and moving its bytes alone gives what slices give."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from weft.box import Affine
from weft.builder import LayoutBuilder
from weft.copies import Copies
from weft.layout import ITEM_BYTES, Int64s, Layout
from weft.lower import ALIGNMENT, SLOTS, LoweredBucket, MemberProgram
from weft.member import Member
from weft.naive import Bits, bits_dtype, expected_memory, poisoned_memory
from weft.plan import Plan, plan
from weft.policy import Policy
from weft.segments import Binding, packed_segments, segments
from weft.testing.lowered import lowered
from weft.testing.models import Case, Rank, random_case

seeds = st.integers(0, 2**32 - 1)
TIGHT = {"bucket_bytes": 4096, "staging_bytes": 4096 * SLOTS * 8}


class Host:
    """One member's memory: one region with its buffers at unaligned places, and what the others are told of it."""

    def __init__(self, layout: Layout, memory: dict[str, Bits], random: Random) -> None:
        self.layout, self.start = layout, {}
        at = 0
        for buffer in layout.buffers:
            at += random.randint(0, 7)
            self.start[buffer.name] = at
            at += buffer.numel * ITEM_BYTES[buffer.dtype]
        self.region = np.full(at, 0xA5, dtype=np.uint8)
        for name, bits in memory.items():
            self.region[self.start[name] : self.start[name] + bits.nbytes] = bits.view(np.uint8)
        starts = np.array([self.start[buffer.name] for buffer in layout.buffers], dtype=np.int64)
        self.binding = Binding(np.zeros(len(starts), np.int64), starts)

    def memory(self) -> dict[str, Bits]:
        """Bits of every buffer."""
        found: dict[str, Bits] = {}
        for buffer in self.layout.buffers:
            nbytes = buffer.numel * ITEM_BYTES[buffer.dtype]
            at = self.start[buffer.name]
            found[buffer.name] = self.region[at : at + nbytes].copy().view(bits_dtype(buffer.dtype))
        return found

    def bytes_of(self, copies: Copies, n: int, width: int, *, sending: bool) -> Int64s:
        """Where in the region each byte of copy n is, in the order of its elements."""
        numbers, offsets, strides = (
            (copies.source_buffer, copies.source_offset, copies.source_strides)
            if sending
            else (copies.target_buffer, copies.target_offset, copies.target_strides)
        )
        elements = np.array([offsets[n]], dtype=np.int64)
        for size, stride in zip(copies.sizes[n].tolist(), strides[n].tolist(), strict=True):
            elements = (elements[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
        start = self.start[self.layout.buffers[numbers[n]].name]
        return (start + elements[:, None] * width + np.arange(width)).ravel()


def check_bucket(planned: Plan, sent: LoweredBucket, received: LoweredBucket, slot_bytes: int) -> Int64s:
    """Both ends agree on all but each other's name, and the bounds hold. Returns bytes per element of each copy."""
    for field in ("index", "group", "counted", "nbytes", "slot", "staged", "scratch"):
        assert getattr(sent, field) == getattr(received, field), field
    for field in ("offsets", "gathered", "scattered"):
        assert getattr(sent, field).tolist() == getattr(received, field).tolist()
    for field in Copies.__slots__:
        assert getattr(sent.copies, field).tolist() == getattr(received.copies, field).tolist(), field
    width = np.array([ITEM_BYTES[t.target_dtype] for t in planned.tensors], dtype=np.int64)[sent.copies.tensor]
    nbytes = sent.copies.numel * width
    assert sent.nbytes == nbytes.sum() <= planned.policy.bucket_bytes
    assert (sent.copies.group == sent.group).all()
    assert (sent.copies.counted == sent.counted).all()
    if sent.slot is not None:
        assert 0 <= sent.slot < SLOTS
        assert (sent.offsets % ALIGNMENT == 0).all()
        ends = sent.offsets + nbytes
        assert (ends[:-1] <= sent.offsets[1:]).all()
        assert ends[-1] <= slot_bytes
    return width


def fewest_runs(here: Host, there: Host, bucket: LoweredBucket, width: Int64s) -> int:
    """Byte ranges that are contiguous at both ends, counted byte by byte (trap 20)."""
    copies, every = bucket.copies, range(len(bucket.copies))
    out = np.concatenate([here.bytes_of(copies, n, int(width[n]), sending=True) for n in every])
    into = np.concatenate([there.bytes_of(copies, n, int(width[n]), sending=False) for n in every])
    order = np.argsort(into)
    return 1 + int(((np.diff(into[order]) != 1) | (np.diff(out[order]) != 1)).sum())


def through_slots(
    here: Host, there: Host, sent: LoweredBucket, received: LoweredBucket, width: Int64s, slot_bytes: int,
    max_segments: int,
) -> None:  # fmt: skip
    """Gather what leaves from the slot, move the segments, scatter what arrives in the slot, and nothing else."""
    shift = 64 * 3
    regions = [[host.region, np.full(shift + slot_bytes, poison, np.uint8)] for host, poison in ((here, 1), (there, 2))]
    slots = ((1, shift), (1, shift))
    for n in np.flatnonzero(sent.gathered).tolist():
        places = here.bytes_of(sent.copies, n, int(width[n]), sending=True)
        start = shift + int(sent.offsets[n])
        regions[0][1][start : start + len(places)] = here.region[places]
    table = packed_segments(sent, width, here.binding, there.binding, slots, True)
    assert len(table) <= max_segments
    mirror = packed_segments(received, width, here.binding, there.binding, slots, False)
    for field, twin in (("region", "remote_region"), ("offset", "remote_offset"), ("nbytes", "nbytes")):
        assert table[field].tolist() == mirror[twin].tolist()
        assert table[twin].tolist() == mirror[field].tolist()
    for row in table:
        source = regions[0][row["region"]][row["offset"] : row["offset"] + row["nbytes"]]
        assert len(source) == row["nbytes"]
        regions[1][row["remote_region"]][row["remote_offset"] : row["remote_offset"] + row["nbytes"]] = source
    for n in np.flatnonzero(received.scattered).tolist():
        places = there.bytes_of(received.copies, n, int(width[n]), sending=False)
        start = shift + int(received.offsets[n])
        there.region[places] = regions[1][1][start : start + len(places)]


def replay(planned: Plan, programs: dict[str, MemberProgram], hosts: dict[str, Host]) -> int:
    """Move every bucket as bytes, through segments or through a slot. Returns the number of buckets."""
    moved = 0
    widths = np.array([ITEM_BYTES[t.target_dtype] for t in planned.tensors], dtype=np.int64)
    for name, program in programs.items():
        for n in range(len(program.local)):
            width = int(widths[program.local.tensor[n]])
            places = [hosts[name].bytes_of(program.local, n, width, sending=sending) for sending in (True, False)]
            hosts[name].region[places[1]] = hosts[name].region[places[0]]
        for sent in program.sends:
            other = programs[sent.peer]
            (received,) = (bucket for bucket in other.receives if bucket.index == sent.index)
            assert received.peer == name
            width = check_bucket(planned, sent, received, program.slot_bytes)
            moved += 1
            here, there = hosts[name], hosts[sent.peer]
            if sent.slot is None:
                table = segments(sent.copies, width, here.binding, there.binding, True)
                mirror = segments(received.copies, width, here.binding, there.binding, False)
                for field, twin in (("region", "remote_region"), ("offset", "remote_offset"), ("nbytes", "nbytes")):
                    assert table[field].tolist() == mirror[twin].tolist()
                    assert table[twin].tolist() == mirror[field].tolist()
                assert table["nbytes"].sum() == sent.nbytes
                assert len(table) == fewest_runs(here, there, sent, width)
                assert len(table) <= planned.policy.max_segments
                for row in table:
                    source = here.region[row["offset"] : row["offset"] + row["nbytes"]]
                    there.region[row["remote_offset"] : row["remote_offset"] + row["nbytes"]] = source
                continue
            through_slots(here, there, sent, received, width, program.slot_bytes, planned.policy.max_segments)
    assert moved == sum(len(program.receives) for program in programs.values())
    return moved


def check_case(case: Case, values: dict[str, Bits], policy: Policy, expected: dict[str, dict[str, Bits]]) -> int:
    planned = plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)
    random = Random(0)
    hosts = {r.member.name: Host(r.layout, expected_memory(values, r.layout), random) for r in case.sources}
    hosts |= {r.member.name: Host(r.layout, poisoned_memory(r.layout), random) for r in case.targets}
    programs = {name: lowered(planned, name) for name in hosts}
    moved = replay(planned, programs, hosts)
    for name, memory in expected.items():
        found = hosts[name].memory()
        for buffer, bits in memory.items():
            assert found[buffer].tobytes() == bits.tobytes(), (name, buffer)
    return moved


@given(seeds, st.sampled_from((1, 4, 16, 10**6)), st.booleans())
@settings(max_examples=100, deadline=None)
@pytest.mark.trap(27, 42)
def test_moving_the_bytes_of_buckets_gives_what_slices_give(seed: int, direct_run_bytes: int, tight: bool) -> None:
    case = random_case(Random(seed))
    assume(any(tensor.numel > 1 for tensor in case.tensors))
    values = case.values(seed)
    policy = Policy(direct_run_bytes=direct_run_bytes, **(TIGHT if tight else {}))
    check_case(case, values, policy, {r.member.name: r.assigned(values) for r in case.targets})


def shard(axis: int, low: int, high: int, *, transposed: bool, group: str = "") -> Layout:
    """Part of a float32 tensor of shape (96, 200), and of a uint8 tensor beside it."""
    builder = LayoutBuilder()
    for name, dtype in (("w", "float32"), ("v", "uint8")):
        shape = [96, 200]
        builder.tensor(name, shape, dtype)
        shape[axis] = high - low
        builder.buffer(name, dtype, shape[0] * shape[1], group=group or name)
        if not transposed:
            builder.shard(name, name, axis=axis, start=low, stop=high)
            continue
        # Element (i, j) of the part is at j·rows + i of the buffer.
        start = low * (200, 1)[axis]
        builder.view(name, Affine(start, tuple(shape), (200, 1)), name, Affine(0, tuple(shape), (1, shape[0])))
    return builder.build()


@pytest.mark.trap(20, 33, 42)
@pytest.mark.parametrize("direct_run_bytes", [1, 256, 10**6])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_copies_are_cut_into_bounded_buckets(direct_run_bytes: int, transposed: bool) -> None:
    assert check_large(transposed, Policy(direct_run_bytes=direct_run_bytes, **TIGHT)) >= 96 * 200 * 5 // 4096


@pytest.mark.trap(20, 36)
@pytest.mark.parametrize("max_segments", [7, 100])
def test_no_bucket_has_more_segments_than_the_policy_allows(max_segments: int) -> None:
    check_large(True, Policy(direct_run_bytes=1, max_segments=max_segments, **TIGHT))


@pytest.mark.trap(36)
@pytest.mark.parametrize("max_segments", [1, 5])
def test_nor_has_a_packed_one(max_segments: int) -> None:
    """Small parts that are dense at the targets, each a segment of its own."""
    policy = Policy(direct_run_bytes=500, max_segments=max_segments)
    assert check_large(False, policy, "g") == (8 if max_segments == 1 else 4)


def test_scalars_alone_are_moved() -> None:
    builder = LayoutBuilder()
    builder.tensor("scale", (), "float32")
    builder.buffer("scale", "float32", 1, group="g")
    builder.shard("scale", "scale")
    layout = builder.build()
    trainer = Member("trainer/0", layout.address, None, None, 1, "a", "a", "cpu")
    rollout = Member("rollout/0", None, layout.address, "rollout", 1, "b", "b", "cpu")
    case = Case((), {}, (Rank(trainer, layout, ()),), (Rank(rollout, layout, ()),))
    values: dict[str, Bits] = {"scale": np.array(7, dtype=np.uint32)}
    assert check_case(case, values, Policy(), {"rollout/0": {"scale": np.array([7], dtype=np.uint32)}}) == 1


@pytest.mark.trap(33)
def test_a_copy_passes_through_slots_only_where_it_is_cut() -> None:
    """Rows of columns are strided at the sources, and dense at the targets unless these are transposed."""
    for transposed in (False, True):
        case, _ = large(transposed)
        policy = Policy(direct_run_bytes=1024)
        planned = plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)
        sends = [bucket for rank in case.sources for bucket in lowered(planned, rank.member.name).sends]
        assert len(sends) == 8
        for bucket in sends:
            assert bucket.slot is not None
            assert bucket.gathered.all()
            assert (bucket.scattered == transposed).all()


def check_large(transposed: bool, policy: Policy, group: str = "") -> int:
    """Rows on two sources to columns on two targets; returns the number of buckets."""
    case, values = large(transposed, group)
    expected = {rank.member.name: expected_memory(values, rank.layout) for rank in case.targets}
    return check_case(case, values, policy, expected)


def large(transposed: bool, group: str = "") -> tuple[Case, dict[str, Bits]]:
    """Two sources with rows, two targets with columns, and the logical tensors."""
    sources = [shard(0, low, low + 48, transposed=False, group=group) for low in (0, 48)]
    targets = [shard(1, low, high, transposed=transposed, group=group) for low, high in ((0, 120), (120, 200))]
    ranks = [
        [
            Rank(
                Member(
                    f"{side}/{n}", layout.address if side == "trainer" else None,
                    layout.address if side == "rollout" else None, "rollout" if side == "rollout" else None, 2,
                    side, side, "cpu",
                ),
                layout,
                (),
            )
            for n, layout in enumerate(layouts)
        ]
        for side, layouts in (("trainer", sources), ("rollout", targets))
    ]  # fmt: skip
    case = Case((), {}, tuple(ranks[0]), tuple(ranks[1]))
    generator = np.random.default_rng(7)
    values: dict[str, Bits] = {
        "w": generator.integers(0, 2**32, (96, 200), dtype=np.uint32),
        "v": generator.integers(0, 2**8, (96, 200), dtype=np.uint8),
    }
    return case, values
