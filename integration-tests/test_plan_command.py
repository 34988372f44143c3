"""`weft plan` with the real adapters, for every model it brings along; no framework runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft_cli.app import main
from weft_cli.models import load_config, presets

Plan = Callable[..., tuple[int, str, str]]


LARGE = ("deepseek-v3", "glm-4.5", "glm-5", "gpt-oss-120b", "kimi-k2", "mixtral-8x7b")
"""Too large for four ranks, and with layers that `engine_elements` does not know."""


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Exit code, standard output and standard error of `weft plan <arguments>`."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weft", "plan", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def engine_elements(config: dict[str, Any], tensor_parallel: int) -> int:
    """Elements of all ranks of an engine, padding left out: sharded ones once, norms and routers on every rank."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    groups = config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    fused_rows = (heads + 2 * groups) * head
    experts = config.get("num_experts", 0)
    inner = experts * config["moe_intermediate_size"] if experts else config["intermediate_size"]
    sharded = fused_rows * hidden + heads * head * hidden + 3 * hidden * inner
    if config["model_type"] == "qwen2":
        sharded += fused_rows
    whole = 2 * hidden + (2 * head if config["model_type"] in ("qwen3", "qwen3_moe") else 0) + experts * hidden
    vocabularies = 1 if config["tie_word_embeddings"] else 2
    embedded = vocabularies * config["vocab_size"] * hidden
    return embedded + layers * sharded + tensor_parallel * (layers * whole + hidden)


@pytest.mark.trap(10, 13)
@pytest.mark.parametrize("model", [name for name in presets() if name not in LARGE])
def test_a_plan_writes_every_element_of_the_engine_once(plan: Plan, model: str) -> None:
    code, out, err = plan("--model", model, "--source", "megatron:tp2,pp2", "--target", "vllm:tp2", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["bytes"] == 2 * engine_elements(dict(load_config(model)), 2)
    assert (found["sources"], found["targets"], found["replicas"]) == (4, 2, 1)
    assert sum(found["egress_bytes"].values()) == found["bytes"]
    assert found["busiest_over_mean"] < 2
    assert found["segments"] > 0


def test_two_engines_are_two_replicas_and_cost_twice_the_bytes(plan: Plan) -> None:
    sides = ("--model", "qwen3-0.6b", "--source", "megatron:tp2,dp2", "--json", "--target")
    one, two = (json.loads(plan(*sides, target)[1]) for target in ("vllm:tp2", "vllm:tp2,dp2"))
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert two["bytes"] == 2 * one["bytes"]
    assert two["fingerprint"] != one["fingerprint"]


MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_experts": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 256, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("source", ["megatron:tp2", "dtensor:fsdp2"])
@pytest.mark.parametrize("target", ["vllm:tp2", "vllm:tp2,ep2"])
def test_every_element_of_every_expert_is_written_once(plan: Plan, source: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    code, out, err = plan("--model", str(tmp_path), "--source", source, "--target", target, "--json")
    assert code == 0, err
    found = json.loads(out)
    attention = (4 + 2 + 2) * 16 * 64 + 4 * 16 * 64
    every_rank = 8 * 64 + 2 * 64 + 2 * 16
    expected = 2 * (attention + 8 * 3 * 32 * 64 + 2 * every_rank) + 2 * 64 + 2 * 256 * 64
    assert found["bytes"] == 2 * expected
    assert found["targets"] == 2
    assert found["tensors"] == 2 * (6 + 1 + 2 + 8 * 3) + 3


@pytest.mark.trap(17)
def test_sizes_that_do_not_factor_are_named(plan: Plan) -> None:
    code, _, err = plan("--model", "qwen3-0.6b", "--source", "megatron:tp2,dp2,ep3", "--target", "vllm:tp2")
    assert code == 2
    assert "ep 3" in err
    code, _, err = plan("--model", "qwen3-0.6b", "--source", "megatron:tp2", "--target", "vllm:tp2,ep4")
    assert code == 2
    assert "ep 4 is not tp 2 · dp 1 = 2" in err
