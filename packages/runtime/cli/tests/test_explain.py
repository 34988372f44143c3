"""Explaining: where each box comes from, and why that member sends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.builder import LayoutBuilder
from weft.errors import ConfigError
from weft.layout import Layout
from weft.member import Member
from weft.plan import plan
from weft_cli.explain import explain

SIDES = ("--source", "toy:tp2,dp2", "--target", "toy:tp4,dp2")


def rows(start: int, stop: int, *, tied: bool = False) -> Layout:
    builder = LayoutBuilder()
    builder.tensor("layers.0.weight", (8, 6), "bfloat16")
    builder.buffer("local", "bfloat16", (stop - start) * 6, group="all")
    builder.shard("layers.0.weight", "local", start=start, stop=stop)
    if tied:
        builder.tie("head.weight", "layers.0.weight")
    return builder.build()


def member(name: str, host: str, device: str, *, source: Layout | None = None, target: Layout | None = None) -> Member:
    addresses = [layout.address if layout else None for layout in (source, target)]
    return Member(name, *addresses, name if target else None, 1 if target else 0, host, f"domain-{host[0]}", device)


def test_a_plan_file_knows_boxes_and_senders_and_says_what_it_does_not_know(
    weft, toy_framework: Path, tmp_path: Path
) -> None:
    file = tmp_path / "toy.plan"
    assert weft("plan", "--model", toy_framework, *SIDES, "--save", file)[0] == 0
    code, out, _ = weft("explain", file, "a", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["shape"] == [64, 8]
    for origin in found["origins"]:
        rank = int(origin["target"].partition("/")[2])
        assert origin["box"] == f"[{rank * 16}:{rank * 16 + 16}, 0:8]"
        assert int(origin["source"].partition("/")[2]) % 2 == rank // 2
        assert origin["nbytes"] == 16 * 8 * 2
        assert (origin["target_buffer"], origin["holders"], origin["share"]) == ("#0", None, None)
    assert len(found["origins"]) == 8
    assert len(found["unknown"]) == 2
    code, out, _ = weft("explain", file, "a", "--rank", "5")
    assert code == 0
    assert "rollout1/1" in out
    assert "rollout1/0" not in out
    assert "unknown: " in out


@pytest.mark.parametrize("with_file", [False, True])
def test_layouts_tell_buffers_and_holders(weft, toy_framework: Path, tmp_path: Path, with_file: bool) -> None:
    file = tmp_path / "toy.plan"
    assert weft("plan", "--model", toy_framework, *SIDES, "--save", file)[0] == 0
    what = [file, "a"] if with_file else ["a"]
    code, out, _ = weft("explain", *what, "--model", toy_framework, *SIDES, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["unknown"] == []
    for origin in found["origins"]:
        assert (origin["target_buffer"], origin["source_buffer"]) == ("a", "a")
        assert (origin["holders"], origin["nearest_holders"], origin["share"]) == (2, 2, 0.5)
        assert origin["source_offset"] == int(origin["target"].partition("/")[2]) % 2 * 16 * 8
    code, out, _ = weft("explain", *what, "--model", toy_framework, *SIDES)
    assert "one of 2 equally near of 2 holders, sends 50.0% of what they send" in out


def test_the_reason_is_the_nearest_holder() -> None:
    whole, half, other = rows(0, 8), rows(0, 4), rows(4, 8)
    sources = [
        member("far0", "b1", "cuda:0", source=half),
        member("far1", "b1", "cuda:0", source=other),
        member("domain", "a2", "cuda:0", source=half),
        member("host0", "a1", "cuda:0", source=half),
        member("host1", "a1", "cuda:1", source=half),
        member("device", "a1", "cuda:7", source=other),
    ]
    target = member("target", "a1", "cuda:7", target=whole)
    layouts = {layout.address: layout for layout in (whole, half, other)}
    first, second = explain(plan(sources, [target], layouts), "layers.0.weight", layouts=layouts).origins
    assert (first.box, first.source[:4], first.distance) == ("[0:4, 0:6]", "host", "same host")
    assert (first.holders, first.nearest_holders) == (4, 2)
    assert (second.box, second.source, second.distance) == ("[4:8, 0:6]", "device", "same device")
    assert (second.holders, second.nearest_holders, second.share) == (2, 1, 1.0)
    assert (second.target_buffer, second.target_offset) == ("local", 24)


@pytest.mark.parametrize("with_file", [True, False])
def test_a_box_that_a_target_passes_on_says_so(weft, toy_framework: Path, tmp_path: Path, with_file: bool) -> None:
    sides = ("--source", "toy:tp2,dp2", "--target", "toy:copies2", "--model", toy_framework, "--relay", "host")
    file = tmp_path / "toy.plan"
    assert weft("plan", *sides, "--save", file)[0] == 0
    what = ("explain", file, "a") if with_file else ("explain", "a", *sides)
    origins = json.loads(weft(*what, "--json")[1])["origins"]
    for origin in origins:
        assert origin["relayed"] == origin["source"].startswith("rollout")
        assert origin["distance"] == ("same host" if origin["relayed"] else "another fabric domain")
    assert {origin["relayed"] for origin in origins} == {True, False}
    _, out, _ = weft(*what)
    relayed = [line for line in out.splitlines() if "same host" in line]
    assert len(relayed) == sum(origin["relayed"] for origin in origins)
    assert all(line.rstrip().endswith("same host; passes on what it received") for line in relayed)


def test_a_tied_name_is_explained_as_its_tensor() -> None:
    tied = rows(0, 8, tied=True)
    layouts = {tied.address: tied}
    made = plan([member("s", "a", "cpu", source=tied)], [member("t", "a", "cpu", target=tied)], layouts)
    assert explain(made, "head.weight").tensor == "layers.0.weight"
    assert explain(made, "head.weight", layouts=layouts).origins[0].holders == 1


def test_unknown_names_are_answered_with_the_nearest(weft, toy_framework: Path) -> None:
    whole = rows(0, 8)
    layouts = {whole.address: whole}
    made = plan([member("s", "a", "cpu", source=whole)], [member("t/10", "a", "cpu", target=whole)], layouts)
    with pytest.raises(ConfigError, match=r"'layers\.7\.wieght'; the nearest are layers\.0\.weight"):
        explain(made, "layers.7.wieght")
    with pytest.raises(ConfigError, match=r"rank '3' is no target of the plan; expected 0 to 0, or a name"):
        explain(made, "layers.0.weight", "3")
    code, _, err = weft("explain", "b", "--model", toy_framework, *SIDES)
    assert (code, "no tensor 'b'" in err) == (2, True)


def test_targets_count_by_the_numbers_in_their_names() -> None:
    whole = rows(0, 8)
    layouts = {whole.address: whole}
    targets = [member(f"t/{n}", "a", "cpu", target=whole) for n in range(11)]
    made = plan([member("s", "a", "cpu", source=whole)], targets, layouts)
    (origin,) = explain(made, "layers.0.weight", "2").origins
    assert origin.target == "t/2"


@pytest.mark.trap(18)
def test_layouts_of_another_plan_are_refused(weft, toy_framework: Path, tmp_path: Path) -> None:
    file = tmp_path / "toy.plan"
    assert weft("plan", "--model", toy_framework, *SIDES, "--save", file)[0] == 0
    other = ("--source", "toy:tp4", "--target", "toy:tp4,dp2")
    code, _, err = weft("explain", file, "a", "--model", toy_framework, *other)
    assert code == 2
    assert "made for other layouts: 2 of its 6" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "expected PLAN TENSOR, or TENSOR with --model"),
        (["x", "y", "z"], "expected PLAN TENSOR"),
        (["a", "--model", "qwen3-0.6b"], "come together; 1 of the three"),
    ],
)
def test_explain_used_wrongly_says_how(weft, arguments: list[str], words: str) -> None:
    code, _, err = weft("explain", *arguments)
    assert code == 2
    assert words in err
