"""Plan files: what is saved is what is loaded, and nothing else is ever taken for a plan."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.builder import LayoutBuilder
from weft.copies import Copies
from weft.errors import PlanError, RecordError
from weft.layout import Layout
from weft.member import Member
from weft.plan import Plan, plan
from weft.planfile import load_plan, save_plan
from weft.policy import Policy


def rows(start: int, stop: int) -> Layout:
    builder = LayoutBuilder()
    builder.tensor("weight", (8, 6), "bfloat16")
    builder.buffer("weight", "bfloat16", (stop - start) * 6, group="all")
    builder.shard("weight", "weight", start=start, stop=stop)
    return builder.build()


@pytest.fixture
def made() -> Plan:
    layouts = [rows(0, 4), rows(4, 8), rows(0, 8)]
    addresses = [layout.address for layout in layouts]
    sources = [Member(f"s{n}", addresses[n], None, None, 1, "h", "h", "cpu") for n in range(2)]
    target = Member("t", None, addresses[2], "r", 1, "h", "h", "cpu")
    return plan(sources, [target], {layout.address: layout for layout in layouts})


def test_a_loaded_plan_equals_the_saved_one(made: Plan, tmp_path: Path) -> None:
    save_plan(made, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan", fingerprint=made.fingerprint)
    assert (loaded.members, loaded.tensors, loaded.policy) == (made.members, made.tensors, made.policy)
    assert loaded.fingerprint == made.fingerprint
    for field in fields(Copies):
        np.testing.assert_array_equal(getattr(loaded.copies, field.name), getattr(made.copies, field.name))


@pytest.mark.trap(18)
def test_a_plan_for_other_layouts_is_refused(made: Plan, tmp_path: Path) -> None:
    save_plan(made, tmp_path / "plan")
    with pytest.raises(PlanError, match="expected 0000"):
        load_plan(tmp_path / "plan", fingerprint="0" * 64)


def test_another_format_version_is_named(made: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    save_plan(made, path)
    data = bytearray(path.read_bytes())
    data[8] = 99
    path.write_bytes(data)
    with pytest.raises(RecordError, match="format version 99, this weft reads 2"):
        load_plan(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_never_loads_as_another_plan(made: Plan, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "plan"
    save_plan(made, path)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        loaded = load_plan(path)
    except (RecordError, PlanError):
        return
    # Padding between header and columns carries nothing; a change there alone is no damage.
    assert loaded.fingerprint == made.fingerprint
    assert loaded.tensors == made.tensors
    np.testing.assert_array_equal(loaded.copies.logical_start, made.copies.logical_start)


def test_saving_replaces_at_once(made: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(b"older")
    save_plan(made, path)
    assert load_plan(path).policy == Policy()
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan"]
