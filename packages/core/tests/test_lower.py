"""Lowering: both ends of a pair agree on every bucket, bounds hold, and segments are complete, disjoint and joined."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from weft.builder import LayoutBuilder
from weft.errors import ConfigError, PlanError
from weft.layout import ITEM_BYTES, Layout
from weft.lower import ALIGNMENT, SLOTS, LoweredBucket, MemberProgram
from weft.member import Member
from weft.plan import Plan, plan
from weft.policy import Policy
from weft.segments import Binding, segments
from weft.testing.lowered import lowered
from weft.testing.models import Case, random_case
from weft.testing.tiny import Tiny

POLICIES = st.builds(
    Policy,
    direct_run_bytes=st.sampled_from([0, 8, 64, 1 << 40]),
    staging_bytes=st.sampled_from([1 << 17, 1 << 20]),
    bucket_bytes=st.sampled_from([4096, 1 << 16]),
    max_segments=st.sampled_from([1, 7, 16_384]),
)


def programs(case: Case, policy: Policy) -> tuple[Plan, dict[str, MemberProgram]]:
    try:
        made = plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)
    except PlanError as error:
        assume("no copies" not in str(error))
        raise
    return made, {member.name: lowered(made, member.name) for member in made.members}


def bind(layout: Layout) -> Binding:
    """Every buffer in a region of its own."""
    return Binding(np.arange(len(layout.buffers)), np.zeros(len(layout.buffers), np.int64))


def segments_of(
    made: Plan, layouts: dict[str, Layout], bucket: LoweredBucket, ends: tuple[str, str], sending: bool
) -> npt.NDArray[np.void]:
    width = np.array([ITEM_BYTES[tensor.target_dtype] for tensor in made.tensors], dtype=np.int64)
    source, target = (made.members[made.index(name)] for name in ends)
    held, wanted = layouts[source.source_layout or ""], layouts[target.target_layout or ""]
    return segments(bucket.copies, width[bucket.copies.tensor], bind(held), bind(wanted), sending)


@pytest.mark.trap(42)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), POLICIES)
def test_both_ends_compute_the_same_buckets_within_all_bounds(random: Random, policy: Policy) -> None:
    case = random_case(random)
    made, found = programs(case, policy)
    assert len({program.slot_bytes for program in found.values()}) == 1
    sent = {(n, b.peer, b.index): b for n, program in found.items() for b in program.sends}
    received = {(b.peer, n, b.index): b for n, program in found.items() for b in program.receives}
    assert set(sent) == set(received)
    assert len({index for _, _, index in sent}) == len(sent)
    width = np.array([ITEM_BYTES[tensor.target_dtype] for tensor in made.tensors], dtype=np.int64)
    written: Counter[tuple[str, int, int]] = Counter()
    for (source, target, index), bucket in sent.items():
        other = received[source, target, index]
        for field in ("group", "counted", "nbytes", "slot", "staged", "scratch"):
            assert getattr(bucket, field) == getattr(other, field)
        assert bucket.offsets.tolist() == other.offsets.tolist()
        assert bucket.nbytes == int((bucket.copies.numel * width[bucket.copies.tensor]).sum())
        if bucket.slot is not None:
            ends = bucket.offsets + bucket.copies.numel * width[bucket.copies.tensor]
            assert not (bucket.offsets % ALIGNMENT).any()
            assert (ends[:-1] <= bucket.offsets[1:]).all()
            assert ends[-1] <= found[source].slot_bytes
            assert bucket.slot == bucket.staged % SLOTS
        near = segments_of(made, case.layouts, bucket, (source, target), True)
        far = segments_of(made, case.layouts, other, (source, target), False)
        mirrored = far[["remote_region", "remote_offset", "region", "offset", "nbytes"]].tolist()
        assert near.tolist() == mirrored
        if bucket.slot is None:
            assert bucket.nbytes <= policy.bucket_bytes
            assert len(near) <= policy.max_segments
        joins = (
            (near["region"][1:] == near["region"][:-1]) & (near["remote_region"][1:] == near["remote_region"][:-1])
            & (near["offset"][1:] == near["offset"][:-1] + near["nbytes"][:-1])
            & (near["remote_offset"][1:] == near["remote_offset"][:-1] + near["nbytes"][:-1])
        )  # fmt: skip
        assert not joins.any(), "neighbouring segments could be one"
        for row in near.tolist():
            written.update((target, row[2], byte) for byte in range(row[3], row[3] + row[4]))
    for n, program in found.items():
        member = made.members[made.index(n)]
        for bucket in (*program.sends, *program.receives):
            assert bucket.peer != member.name
    assert max(written.values(), default=1) == 1
    assert sum(written.values()) == sum(bucket.nbytes for bucket in sent.values())
    expected = int(made.copy_bytes[made.copies.source != made.copies.target].sum())
    assert sum(written.values()) == expected


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), POLICIES)
def test_buckets_of_a_pair_come_group_by_group_and_count_their_slots(random: Random, policy: Policy) -> None:
    _, found = programs(random_case(random), policy)
    for program in found.values():
        for peer in {bucket.peer for bucket in program.sends}:
            ours = [bucket for bucket in program.sends if bucket.peer == peer]
            assert [bucket.group for bucket in ours] == sorted(bucket.group for bucket in ours)
            assert [bucket.index for bucket in ours] == sorted(bucket.index for bucket in ours)
            staged = [bucket.staged for bucket in ours if bucket.slot is not None]
            assert staged == list(range(len(staged)))


def tiny_plan(policy: Policy, targets: int = 2) -> tuple[Plan, dict[str, Layout]]:
    tiny = Tiny()
    held = [tiny.source(0, 1)]
    wanted = [tiny.target(rank, targets) for rank in range(targets)]
    sources = [Member("s0", layout.address, None, None, 1, "h", "h", "cpu") for layout in held]
    receivers = [
        Member(f"t{n}", None, layout.address, "r", targets, "h", "h", "cpu") for n, layout in enumerate(wanted)
    ]
    layouts = {layout.address: layout for layout in (*held, *wanted)}
    return plan(sources, receivers, layouts, policy), layouts


@pytest.mark.trap(20)
def test_one_strided_copy_with_many_runs_is_divided_into_buckets_of_few_segments() -> None:
    made, layouts = tiny_plan(Policy(max_segments=5))
    for bucket in lowered(made, "s0").sends:
        assert len(segments_of(made, layouts, bucket, ("s0", bucket.peer), True)) <= 5


@pytest.mark.parametrize("direct_run_bytes", [0, 1 << 40])
def test_scalars_are_lowered(direct_run_bytes: int) -> None:
    builder = LayoutBuilder()
    builder.tensor("scale", (), "float32")
    builder.buffer("scale", "float32", 1, group="g")
    builder.shard("scale", "scale")
    layout = builder.build()
    members = [
        Member("s", layout.address, None, None, 1, "h", "h", "cpu"),
        Member("t", None, layout.address, "r", 1, "h", "h", "cpu"),
    ]
    layouts = {layout.address: layout}
    made = plan(members[:1], members[1:], layouts, Policy(direct_run_bytes=direct_run_bytes))
    (bucket,) = lowered(made, "s").sends
    assert bucket.nbytes == 4
    assert segments_of(made, layouts, bucket, ("s", "t"), True).tolist() == [(0, 0, 0, 0, 4)]


def test_a_staging_budget_that_is_too_small_says_what_would_do() -> None:
    made, _ = tiny_plan(Policy(staging_bytes=65_536), targets=12)
    with pytest.raises(ConfigError, match=r"staging_bytes is 65536, .* 12 peers .* at least 98304"):
        lowered(made, "s0")
