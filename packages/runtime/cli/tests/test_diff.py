"""What tells two plans apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.builder import LayoutBuilder
from weft.layout import Layout
from weft.member import Member
from weft.plan import Plan, plan
from weft.policy import Policy
from weft_cli.diff import PairBytes, diff


def rows(start: int, stop: int, dtype: str = "bfloat16") -> Layout:
    builder = LayoutBuilder()
    builder.tensor("weight", (8, 6), dtype)
    builder.buffer("local", dtype, (stop - start) * 6, group="all")
    builder.shard("weight", "local", start=start, stop=stop)
    return builder.build()


def between(sources: dict[str, Layout], targets: dict[str, Layout], policy: Policy | None = None) -> Plan:
    layouts = {layout.address: layout for layout in (*sources.values(), *targets.values())}
    held = [Member(name, layout.address, None, None, 0, "h", "h", "cpu") for name, layout in sources.items()]
    wanted = [Member(name, None, layout.address, name, 1, "h", "h", "cpu") for name, layout in targets.items()]
    return plan(held, wanted, layouts, policy)


@pytest.mark.trap(73)
def test_plans_of_equal_arguments_are_equal(weft, toy_framework: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two")]
    for file in files:
        sides = ("--source", "toy:tp2", "--target", "toy:tp4", "--save", file)
        assert weft("plan", "--model", toy_framework, *sides)[0] == 0
    code, out, _ = weft("diff", *files, "--json")
    found = json.loads(out)
    assert (code, found["equal"]) == (0, True)
    assert found["fingerprints"][0] == found["fingerprints"][1]
    code, out, _ = weft("diff", *files)
    assert code == 0
    assert out.startswith("equal")


def test_plans_that_differ_end_in_exit_code_1(weft, toy_framework: Path, tmp_path: Path) -> None:
    files = []
    for target in ("toy:tp4", "toy:tp2"):
        files.append(tmp_path / target)
        sides = ("--source", "toy:tp2", "--target", target, "--save", files[-1])
        assert weft("plan", "--model", toy_framework, *sides)[0] == 0
    code, out, _ = weft("diff", *files, "--json")
    assert code == 1
    found = json.loads(out)
    assert found["members"]["removed"] == ["rollout0/2", "rollout0/3"]
    assert found["members"]["added"] == []
    assert any(words.startswith("rollout0/0: target_layout was") for words in found["members"]["changed"])
    assert (found["copies_removed"], found["copies_added"]) == (4, 2)
    assert found["bytes_removed"] == found["bytes_added"] == 64 * 8 * 2
    code, out, _ = weft("diff", *files)
    assert code == 1
    assert "member removed: rollout0/3" in out
    assert "copies: 4 of 1,024 bytes removed, 2 of 1,024 bytes added" in out


def test_a_copy_is_its_box_wherever_it_lies() -> None:
    builder = LayoutBuilder()
    builder.tensor("weight", (8, 6), "bfloat16")
    builder.buffer("local", "bfloat16", 60, group="all")
    builder.shard("weight", "local", offset=12)
    builder.fill("local", 0, (12,), (1,))
    found = diff(between({"s": rows(0, 8)}, {"t": rows(0, 8)}), between({"s": rows(0, 8)}, {"t": builder.build()}))
    assert (found.copies_added, found.copies_removed, found.pairs) == (0, 0, [])
    assert not found.equal
    assert [words.split()[1] for words in found.members.changed] == ["target_layout"]


def test_pairs_are_listed_with_their_bytes() -> None:
    before = between({"a": rows(0, 4), "b": rows(4, 8)}, {"t": rows(0, 8)})
    after = between({"a": rows(0, 2), "b": rows(2, 8)}, {"t": rows(0, 8)})
    found = diff(before, after)
    assert found.pairs == [PairBytes("a", "t", 48, 24), PairBytes("b", "t", 48, 72)]
    assert (found.copies_added, found.copies_removed) == (2, 2)


def test_tensors_and_policy_are_compared_by_field() -> None:
    before = between({"s": rows(0, 8)}, {"t": rows(0, 8)})
    policy = Policy(casts=(("float32", "bfloat16"),))
    found = diff(before, between({"s": rows(0, 8, "float32")}, {"t": rows(0, 8)}, policy))
    assert found.tensors.changed == ["weight: source_dtype was bfloat16, is float32"]
    assert found.policy == ["policy: casts was (), is (('float32', 'bfloat16'),)"]
    assert (found.copies_added, found.copies_removed, found.pairs) == (0, 0, [])


def test_a_file_that_is_no_plan_is_refused(weft, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a plan")
    code, _, err = weft("diff", tmp_path / "x", tmp_path / "x")
    assert code == 1
    assert "not a plan file" in err
