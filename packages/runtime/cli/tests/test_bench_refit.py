"""The figures of `weft bench refit`, from what members say that they measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from weft.errors import ConfigError, WeftError
from weft.policy import Policy
from weft_cli.bench import plot
from weft_cli.bench.cases import NAMED, case_of, named_case
from weft_cli.bench.rows import above_limit, check_limit, row
from weft_cli.bench.settings import Case, MemberResult

SLOW_FIRST = {"rank/0": [9.0, 4.0, 4.0], "rank/1": [9.0, 3.0, 6.0]}


def case(**more: Any) -> Case:
    return case_of("mine", {}, "megatron:tp1", "vllm:tp1", "gloo", Policy(), 3, **more)


def member(name: str, totals: list[float], **more: Any) -> MemberResult:
    """Of three cycles; every refit has 0.1 s each of `gather` and `land`, and `wire` for the rest."""
    nothing: list[int] = [0, 0, 0]
    refits = [
        {"gather": 0.1, "digest": 0.0, "land": 0.1, "install": 0.0, "commit": 0.0, "wire": total - 0.2, "total": total}
        for total in totals
    ]
    result = MemberResult(
        name=name, bytes=0, joins=[{"allocate": 1.0, "register": 2.0, "join": 3.0}, {}, {}], refits=refits, pauses=[],
        beside_pauses=[], beside_seconds=[], bare_bytes=0, bare_seconds={}, tensor_by_tensor_seconds=[],
        megatron_seconds=[], registrations=nothing, allocations=nothing, store_operations=nothing,
        extra_peak_bytes=7, wrong_bytes=0,
    )  # fmt: skip
    return msgspec.structs.replace(result, **more)


def measured(refits: list[float], chunks: dict[int, list[float]]) -> Any:
    source = member("source/0", refits, bare_bytes=500, bare_seconds=chunks)
    return row(case(), [source, member("target/0", [total / 2 for total in refits], bytes=1000)])


def test_a_cycle_lasts_as_long_as_its_slowest_member_and_the_best_chunk_is_the_limit() -> None:
    found = measured([9.0, 4.0, 6.0], {1: [3.0, 3.0, 3.0], 2: [9.0, 1.0, 2.0]})
    assert (found["first_seconds"], found["seconds_median"], found["seconds_warm"]) == (9.0, 5.0, [4.0, 6.0])
    assert (found["raw_chunk_bytes"], found["raw_seconds_median"]) == (2, 4.0), "the bare transfers had half the bytes"
    assert found["ratio_to_raw"] == pytest.approx(0.8)
    assert found["open_seconds"] == 6.0
    assert [phases["total"] for phases in found["cycles"]["source/0"]] == [15.0, 4.0, 6.0]


def test_pauses_are_compared_where_landing_differs() -> None:
    shadow, source = Policy(landing="shadow"), member("source/0", [9.0, 4.0, 6.0])
    target = member("target/0", [9.0, 4.0, 6.0], bytes=1, pauses=[5.0, 1.0, 3.0], beside_pauses=[9.0, 4.0, 4.0])
    found = row(msgspec.structs.replace(case(), policy=shadow, beside=Policy()), [source, target])
    assert (found["pause_seconds_median"], found["beside_pause_seconds_median"]) == (2.0, 4.0)
    assert found["ratio_to_beside_pause"] == 2.0
    assert row(msgspec.structs.replace(case(), beside=Policy()), [source, target])["ratio_to_beside_pause"] is None


def test_without_reuse_joining_is_part_of_every_cycle() -> None:
    joined = {"allocate": 1.0, "register": 0.0, "join": 1.0}
    found = row(case(reuse=False), [member("both/0", [1.0, 2.0, 4.0], joins=[joined] * 3, bytes=1)])
    assert found["seconds_warm"] == [4.0, 6.0]
    assert found["ratio_to_raw"] is None


def test_what_runs_in_turn_is_compared_in_its_warm_cycles() -> None:
    members = [member(name, [1.0, 2.0, 2.0], bytes=1, megatron_seconds=took) for name, took in SLOW_FIRST.items()]
    found = row(case(), members)
    assert (found["megatron_seconds_median"], found["ratio_to_megatron"]) == (5.0, 2.5)
    assert found["tensor_by_tensor_seconds_median"] is None


def test_a_rate_above_the_limit_is_refused_by_name() -> None:
    slow = measured([1.0, 4.0, 4.0], {1: [1.0, 1.0, 1.0]})
    fast = measured([1.0, 1.5, 1.5], {1: [1.0, 1.0, 1.0]})
    assert (above_limit(slow), above_limit(fast)) == (False, True)
    check_limit([slow])
    with pytest.raises(WeftError, match=r"above the limit.*mine \(digests on\)"):
        check_limit([slow, fast])


@pytest.mark.parametrize("name", NAMED)
def test_every_named_case_has_its_name_and_digests_as_asked(name: str) -> None:
    for digests in (False, True):
        found = named_case(name, digests, 4, reuse=True)
        assert (found.name, found.policy.digests, found.cycles) == (name, digests, 4)
        beside_without = name.endswith(("-digested", "-sampled"))
        assert found.beside is None or found.beside.digests == (digests and not beside_without)
        assert found.transport_options == ({"direction": "pull"} if name.endswith("-pull") else found.beside_options)


def test_an_unknown_case_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no case 'dense'; there are nixl-dense, "):
        named_case("dense", True, 3, reuse=True)


def test_the_bars_of_a_figure_add_up_to_whole_cycles() -> None:
    found = measured([9.0, 4.0, 6.0], {1: [3.0, 3.0, 3.0]})
    bars = plot.cycles([found])["data"]
    heights = [sum(bar["y"][place] for bar in bars) for place in range(6)]
    assert heights == pytest.approx([15_000, 4_000, 6_000, 10_500, 2_000, 3_000])
    assert bars[0]["x"][1][:2] == ["source/0, cycle 1", "source/0, cycle 2"]


def test_a_figure_that_cannot_be_written_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must end with one of \.html, \.png, \.svg"):
        plot.check(Path("figure.gif"))
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None if name == "kaleido" else object())
    plot.check(Path("figure.html"))
    with pytest.raises(ConfigError, match=r"pip install kaleido; a file ending with \.html"):
        plot.check(Path("figure.png"))
