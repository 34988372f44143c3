"""`weft bench refit` moves real bytes between real processes and says what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from weft.builder import LayoutBuilder
from weft.testing.members import MemoryTarget
from weft_cli.app import application
from weft_cli.bench import pattern

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


@pytest.mark.trap(29, 41)
@pytest.mark.parametrize("transport", ["nixl", "gloo"])
def test_a_benchmark_reports_what_it_moved_and_that_every_byte_is_right(transport: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    arguments = [
        "bench",
        "refit",
        "--model",
        str(tmp_path),
        "--transport",
        transport,
        "--digests",
        "--cycles",
        "3",
        "--json",
    ]
    result = CliRunner().invoke(application, arguments)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)[0]
    assert row["wrong_bytes"] == 0
    assert row["bytes"] > 150_000
    assert (row["registrations_warm"], row["allocations_warm"]) == (0, 0)
    assert (row["ratio_to_raw"] is not None) == (transport == "nixl")


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
