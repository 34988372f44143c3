"""`weft bench refit` moves real bytes between real processes and says what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from weft.builder import LayoutBuilder
from weft.plugins import load
from weft.policy import Policy
from weft.testing.members import MemoryTarget
from weft_cli.app import application
from weft_cli.bench import pattern
from weft_cli.bench.cases import case_of, named_case
from weft_cli.bench.gathering import run_gathering
from weft_cli.bench.packing import run_packing
from weft_cli.bench.registration import Sizes, run_registration
from weft_cli.bench.run import seats
from weft_cli.bench.transport import Shape, run_transport

TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}


def refit_rows(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """So little is moved here that a busy machine may slow down the bare transfers alone; such rates are refused."""
    (folder / "config.json").write_text(json.dumps(TINY))
    for _ in range(4):
        result = CliRunner().invoke(application, ["bench", "refit", "--model", str(folder), "--json", *arguments])
        if "rates above the limit" not in str(result.exception):
            break
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


@pytest.mark.trap(29, 41)
@pytest.mark.parametrize("transport", ["nixl", "gloo", "mapped"])
def test_a_benchmark_reports_what_it_moved_and_that_every_byte_is_right(transport: str, tmp_path: Path) -> None:
    (row,) = refit_rows(tmp_path, "--transport", transport, "--digests", "--cycles", "3")
    assert row["wrong_bytes"] == 0
    assert row["bytes"] > 150_000
    assert (row["registrations_warm"], row["allocations_warm"]) == (0, 0)
    assert 0 < row["ratio_to_raw"] <= 1
    assert row["extra_peak_bytes"] > 0
    assert sorted(row["cycles"]) == ["source/0", "source/1", "target/0", "target/1"]
    for cycles in row["cycles"].values():
        assert [phases["join"] > 0 for phases in cycles] == [True, False, False]
        for phases in cycles:
            parts = sum(seconds for phase, seconds in phases.items() if phase not in ("pause", "total"))
            assert parts == pytest.approx(phases["total"])


def test_without_reuse_every_cycle_joins_and_pays_for_it(tmp_path: Path) -> None:
    (row,) = refit_rows(tmp_path, "--transport", "gloo", "--digests", "--cycles", "2", "--no-reuse")
    assert row["wrong_bytes"] == 0
    assert all(phases["join"] > 0 for cycles in row["cycles"].values() for phases in cycles)
    slowest = max(cycles[1]["total"] for cycles in row["cycles"].values())
    assert row["seconds_median"] == pytest.approx(slowest)


def test_wrong_bytes_are_counted() -> None:
    builder = LayoutBuilder()
    builder.tensor("w", (8, 4), "bfloat16")
    builder.buffer("w", "bfloat16", 32, group="g")
    builder.shard("w", "w")
    target = MemoryTarget("t", builder.build())
    assert pattern.wrong_bytes(target.layout(), target.memory(), 1) == 64
    pattern.fill(target.layout(), target.memory(), 1)
    assert pattern.wrong_bytes(target.layout(), target.memory(), 1) == 0
    target.memory()["w"].view(torch.int16)[5] ^= 1
    assert pattern.wrong_bytes(target.layout(), target.memory(), 1) == 2


@pytest.mark.parametrize("transport", ["nixl", "gloo", "mapped"])
def test_a_transport_alone_moves_every_byte_beside_bare_transfers(transport: str) -> None:
    shapes = [Shape(1, 4 << 10), Shape(2_000, 1 << 10), Shape(40, 1 << 20)]
    rows = run_transport(transport, shapes)
    assert [row["bytes"] for row in rows] == [shape.total for shape in shapes]
    assert all(row["wrong_bytes"] == 0 and row["ratio_to_raw"] > 0 for row in rows)


@pytest.mark.trap(29)
@pytest.mark.parametrize("transport", ["nixl", "gloo"])
def test_registering_tensor_by_tensor_is_compared_with_one_allocation(transport: str) -> None:
    rows = run_registration(transport, Sizes(1 << 22, 20, (10, 100)))
    assert [(row["case"], row["count"]) for row in rows] == [
        ("one allocation", 1), ("tensor by tensor", 20), ("prepare segments", 10), ("prepare segments", 100)
    ]  # fmt: skip
    assert all(row["seconds_median"] > 0 for row in rows)


def test_collocated_ranks_are_one_process() -> None:
    apart = case_of("mine", {}, "megatron:tp1", "vllm:tp1", "gloo", Policy(), 3)
    together = named_case("four-ranks-gloo", False, 3, reuse=True)
    assert [seat.name for seat in seats(apart)] == ["source/0", "target/0"]
    assert [(seat.source, seat.target) for seat in seats(together)] == [(n, n) for n in range(4)]


@pytest.mark.parametrize("transport", ["nixl", "gloo"])
def test_runs_are_moved_straight_and_packed(transport: str) -> None:
    found = run_packing(transport, (256, 64 << 10), 1 << 20)
    assert [(row.run_bytes, row.bytes, row.wrong_bytes) for row in found.rows] == [
        (256, 1 << 20, 0), (64 << 10, 1 << 20, 0)
    ]  # fmt: skip
    assert found.best_direct_run_bytes in (256, 64 << 10, 128 << 10)
    assert found.direct_run_bytes == load("weft.transports", transport)({}).capabilities.direct_run_bytes


@pytest.mark.parametrize("transport", ["nixl", "gloo"])
def test_many_sources_send_each_by_itself_and_gathered(transport: str) -> None:
    rows = run_gathering(transport, 3, (3 << 10, 3 << 18))
    assert [(row.bytes, row.wrong_bytes) for row in rows] == [(3 << 10, 0), (3 << 18, 0)]
    assert all(row.each_seconds_median > 0 and row.gathered_seconds_median > 0 for row in rows)
