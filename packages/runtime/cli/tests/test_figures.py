"""The figures of a plan, against what lowering and preparing make of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from weft.builder import LayoutBuilder
from weft.layout import Kind, Layout
from weft.lower import lower
from weft.member import Member
from weft.plan import plan
from weft.policy import Policy
from weft.prepare import make_endpoint
from weft.slices import slice_of
from weft.testing.members import allocate
from weft_cli.figures import figures
from weft_cli.planning import Sides

ROWS, COLUMNS = 64, 96


def layout(kinds: Mapping[str, Kind], norm: str, axis: int = 0, part: int = 0, parts: int = 1) -> Layout:
    """Part of two matrices, cut along an axis, and a whole norm with a dtype of its own."""
    builder = LayoutBuilder(scratch_slots=1)
    for name, kind in kinds.items():
        size = (ROWS, COLUMNS)[axis] // parts
        builder.tensor(name, (ROWS, COLUMNS), "bfloat16")
        builder.buffer(name, "bfloat16", ROWS * COLUMNS // parts, group=name, kind=kind)
        builder.shard(name, name, axis=axis, start=part * size, stop=part * size + size)
    builder.tensor("norm", (COLUMNS,), norm)
    builder.buffer("norm", norm, COLUMNS, group="norm")
    builder.shard("norm", "norm")
    return builder.build()


@pytest.fixture
def sides() -> Sides:
    """Two sources with columns each, two targets with rows each; `down` lands in scratch."""
    live = {"up": Kind.LIVE, "down": Kind.LIVE}
    held = [layout(live, "float32", 1, part, 2) for part in range(2)]
    wanted = [layout({"up": Kind.LIVE, "down": Kind.SCRATCH}, "bfloat16", 0, part, 2) for part in range(2)]
    sources = [Member(f"s{n}", each.address, None, None, 0, "h", "h", "cpu") for n, each in enumerate(held)]
    targets = [Member(f"t{n}", None, each.address, "r", 2, "h", "h", "cpu") for n, each in enumerate(wanted)]
    return Sides(sources, targets, {each.address: each for each in (*held, *wanted)})


@pytest.mark.parametrize("direct_run_bytes", [0, 96, 97])
def test_what_is_packed_is_what_lowering_packs(sides: Sides, direct_run_bytes: int) -> None:
    policy = Policy(casts=(("float32", "bfloat16"),), direct_run_bytes=direct_run_bytes)
    made = plan(sides.sources, sides.targets, sides.layouts, policy)
    found = figures(made, sides)
    programs = [lower(slice_of(made, member.name)) for member in sides.sources]
    packed = [bucket for program in programs for bucket in program.sends if bucket.slot is not None]
    assert sum(each.bytes for each in found.packed) == sum(bucket.nbytes for bucket in packed)
    assert sum(each.copies for each in found.packed) == sum(len(bucket.copies) for bucket in packed)
    reasons = [each.reason for each in found.packed]
    runs = ["runs of 96 to 96 bytes, shorter than 97"] if direct_run_bytes == 97 else []
    assert reasons == [*runs, "cast from float32 to bfloat16"]
    assert found.bytes == sum(found.egress_bytes.values()) == sum(found.ingress_bytes.values())


@pytest.mark.parametrize("direct_run_bytes", [0, 97])
def test_predicted_memory_is_what_preparing_allocates(sides: Sides, direct_run_bytes: int) -> None:
    policy = Policy(casts=(("float32", "bfloat16"),), direct_run_bytes=direct_run_bytes)
    made = plan(sides.sources, sides.targets, sides.layouts, policy)
    found = figures(made, sides)
    for member in made.members:
        own = sides.layouts[member.source_layout or member.target_layout or ""]
        ends = [(own, allocate(own)) if address else None for address in (member.source_layout, member.target_layout)]
        regions = {r.name: r.nbytes for r in make_endpoint(lower(slice_of(made, member.name)), *ends).regions}
        predicted = found.memory[member.name]
        assert predicted.staging_in == regions.get("staging-incoming", 0)
        assert predicted.staging_out == regions.get("staging-outgoing", 0)
        arena = sum(b.numel * 2 for b in own.buffers if b.kind is Kind.SCRATCH)
        assert predicted.scratch == arena
    assert max(memory.scratch for memory in found.memory.values()) == ROWS * COLUMNS
    assert max(memory.staging_out for memory in found.memory.values()) > 0


def test_scratch_groups_share_as_many_slots_as_the_layout_has() -> None:
    for slots, expected in ((1, 640), (2, 1280), (9, 1920)):
        builder = LayoutBuilder(scratch_slots=slots)
        for name, rows in (("a", 2), ("b", 20), ("c", 3)):
            builder.tensor(name, (rows, 8), "float32")
            builder.buffer(name, "float32", rows * 8, group=name, kind=Kind.SCRATCH)
            builder.shard(name, name)
        target = builder.build()
        held = LayoutBuilder()
        for name, rows in (("a", 2), ("b", 20), ("c", 3)):
            held.tensor(name, (rows, 8), "float32")
            held.buffer(name, "float32", rows * 8, group=name)
            held.shard(name, name)
        source = held.build()
        both = Sides(
            [Member("s", source.address, None, None, 0, "h", "h", "cpu")],
            [Member("t", None, target.address, "t", 1, "h", "h", "cpu")],
            {each.address: each for each in (source, target)},
        )
        made = plan(both.sources, both.targets, both.layouts)
        assert figures(made, both).memory["t"].scratch == expected
