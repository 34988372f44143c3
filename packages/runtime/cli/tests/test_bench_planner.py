"""Benchmarks of planning: their rows are the plan's own figures, from processes of their own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from pathlib import Path

import msgspec
import pytest

from weft.errors import ConfigError, DeadlineError, WeftError
from weft.planfile import load_plan
from weft.slices import slice_of
from weft_cli.bench import planner_command
from weft_cli.bench.beside import run_beside
from weft_cli.bench.isolated import in_own_process, rss_bytes
from weft_cli.bench.planner import PlannerCase, run_planner_case
from weft_cli.bench.results import PlannerRow
from weft_cli.models import load_config

TOY = PlannerCase("toy", "toy", "toy:tp2", "toy:tp4,dp2")


def process(argument: bytes) -> bytes:
    return f"{argument.decode()} in {os.getpid()}".encode()


def fail(argument: bytes) -> bytes:
    raise ValueError(argument.decode())


def wait(argument: bytes) -> bytes:
    time.sleep(600)
    return argument


def grow(argument: bytes) -> bytes:
    taken = bytearray(b"x" * int(argument))
    del taken
    now, peak = rss_bytes()
    return f"{peak - now}".encode()


def test_a_function_runs_in_a_process_of_its_own() -> None:
    answer = in_own_process(process, b"here", 120).decode()
    assert answer.startswith("here in ")
    assert answer != f"here in {os.getpid()}"


def test_a_process_that_fails_or_lingers_is_an_error() -> None:
    with pytest.raises(WeftError, match="fail of the benchmark failed"):
        in_own_process(fail, b"no", 120)
    with pytest.raises(DeadlineError, match="the benchmark wait"):
        in_own_process(wait, b"", 0.5)


def test_peak_memory_is_what_was_there_at_most() -> None:
    assert int(in_own_process(grow, b"200000000", 120)) > 150_000_000


def test_a_row_has_the_figures_of_the_plan_that_is_saved(toy_framework: Path, tmp_path: Path) -> None:
    row = run_planner_case(TOY, load_config(str(toy_framework)), tmp_path, 120)
    saved = load_plan(tmp_path / "toy.plan")
    statistics = saved.statistics
    assert (row.source_ranks, row.target_ranks, row.logical_tensors) == (2, 8, 1)
    assert (row.copies, row.segments, row.bytes) == (statistics.copies, statistics.segments, 64 * 8 * 2 * 2)
    assert (row.cross_host_bytes, row.once_per_host_bytes) == (2048, 1024)  # both replicas are on one host
    assert row.egress_over_bound == statistics.egress_over_bound
    assert row.ingress_over_bound == 1.0
    assert row.peers_per_rank_max == max(statistics.peers.values()) == 4
    assert row.distinct_layouts == 6
    slices = [len(slice_of(saved, member.name).encoded) for member in saved.members]
    assert (row.bytes_per_member_read, row.bytes_planner_published) == (max(slices), sum(slices))
    assert row.bytes_planner_read > 0
    assert min(row.plan_seconds, row.decode_seconds, row.rank_plan_seconds, row.calibration_sort_seconds) > 0
    assert row.peak_rss_bytes >= row.rss_before_bytes > 1_000_000


def test_rows_are_printed_and_every_case_is_in_the_help(
    weft, toy_framework: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, words, _ = weft("bench", "planner", "--help")
    assert all(case.name in words for case in planner_command.CASES)
    monkeypatch.setattr(planner_command, "CASES", (PlannerCase("toy", str(toy_framework), "toy:tp2", "toy:tp2"),))
    code, out, _ = weft("bench", "planner", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert (row["case"], row["copies"]) == ("toy", 2)
    made = msgspec.convert(row, PlannerRow)
    monkeypatch.setattr(planner_command, "run_planner_case", lambda *arguments: made)
    code, out, _ = weft("bench", "planner", "--case", "toy")
    assert code == 0
    assert "2 to 2" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "qwen9"], "no case qwen9; there are qwen3-30b-a3b"),
        (["--case", "kimi-k2-tp1", "--beside-megatron"], "go without --beside-megatron"),
        (["--ranks", "64"], "goes with --beside-megatron"),
    ],
)
def test_bench_planner_used_wrongly_says_how(weft, arguments: list[str], words: str) -> None:
    code, _, err = weft("bench", "planner", *arguments)
    assert code == 2
    assert words in err


def test_the_comparison_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.16.1")
    with pytest.raises(ConfigError, match="ranks is 96; the case needs a multiple of 64"):
        run_beside("qwen3-30b-a3b", {}, 96, 10)

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ConfigError, match=r"pip install megatron-core==0\.16\.1"):
        run_beside("qwen3-30b-a3b", {}, 64, 10)
