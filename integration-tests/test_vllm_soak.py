"""What the soak of a real engine rests on: tokens that name their version, and a ledger that notes broken promises.

`nox -s "soak(vllm)"` is the soak.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "vllm_engine"))

pytest.importorskip("transformers", reason="needs transformers")
import torch
from coded import CODES, MIXED, POSITIONS, Coded, token_of
from ledger import Ledger
from support.vllm_soak import not_flat
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def coded() -> Coded:
    return Coded()


def said(model: LlamaForCausalLM, weights: dict[str, torch.Tensor], prompt: torch.Tensor) -> set[int]:
    """All greedy tokens of a prompt."""
    model.load_state_dict(weights)
    with torch.no_grad():
        return set(model(prompt).logits[0].argmax(-1).tolist())


@pytest.mark.trap(43)
def test_a_token_names_its_version_and_every_mixture(coded: Coded) -> None:
    prompt = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    for version in (0, 1, CODES - 1, CODES, 3 * CODES + 5):
        assert said(coded.model, coded.weights(version), prompt) == {token_of(version)}
    old, new = coded.weights(3), coded.weights(4)
    silent = {name for name in old if said(coded.model, {**old, name: new[name]}, prompt) != {MIXED}}
    assert silent == {name for name in old if name.endswith(("q_proj.weight", "k_proj.weight"))}


@pytest.mark.trap(57)
@pytest.mark.parametrize("stale", [1, POSITIONS - 2])
def test_what_other_weights_have_computed_is_a_mixture(coded: Coded, stale: int) -> None:
    model = coded.model
    prompt = torch.zeros(1, POSITIONS - 1, dtype=torch.long)
    model.load_state_dict(coded.weights(3))
    with torch.no_grad():
        cache = model(prompt[:, :stale], use_cache=True).past_key_values
        model.load_state_dict(coded.weights(4))
        logits = model(prompt[:, stale:], past_key_values=cache).logits[0]
    assert set(logits.argmax(-1).tolist()) == {MIXED}


def test_what_is_as_promised_is_not_noted() -> None:
    ledger = Ledger(token_of, lambda: None)
    first, second = ledger.begin(4), ledger.begin(3)
    ledger.get(first, [token_of(0)])
    ledger.get(second, [token_of(0)] * 3)
    ledger.end(second, "length")
    ledger.refitting = True
    ledger.end(first, "abort")
    ledger.commit(7)
    ledger.refitting = False
    third = ledger.begin(3)
    ledger.get(third, [token_of(7)] * 2)
    ledger.mode = "keep"
    ledger.commit(8)
    ledger.get(third, [token_of(8)])
    ledger.label(third, 7, 0, 2)
    ledger.label(third, 8, 2, 3)
    ledger.end(third, "length")
    assert ledger.wrong == []
    assert ledger.counts["straddling"] == 1
    assert ledger.counts["tokens"] == 7


@pytest.mark.trap(43, 57)
@pytest.mark.parametrize(
    ("what", "noted"),
    [
        ("old token", "while version 8 is served"),
        ("mixed token", "while version 8 is served"),
        ("goes on", "goes on after a pause with mode wait"),
        ("backwards", "committed after 8"),
        ("while refusing", "refuses: mixed"),
        ("aborted", "aborted with mode wait"),
        ("short", "2 tokens came, not 4"),
        ("label", "labelled with version 7"),
        ("refused late", "has 2 tokens is refused"),
        ("other end", "ended with error"),
    ],
)
def test_what_is_not_as_promised_is_noted(what: str, noted: str) -> None:
    refusing: list[str] = []
    ledger = Ledger(token_of, lambda: refusing[0] if refusing else None, version=8, mode="wait")
    attempt = ledger.begin(4)
    ledger.get(attempt, [token_of(8)] * 2)
    assert not ledger.wrong
    match what:
        case "old token":
            ledger.get(attempt, [token_of(7)])
        case "mixed token":
            ledger.get(attempt, [MIXED])
        case "goes on":
            ledger.commit(9)
            ledger.get(attempt, [token_of(9)])
        case "backwards":
            ledger.commit(7)
        case "while refusing":
            refusing.append("mixed")
            ledger.get(attempt, [token_of(8)])
        case "aborted":
            ledger.refitting = True
            ledger.end(attempt, "abort")
        case "short":
            ledger.end(attempt, "length")
        case "label":
            ledger.label(attempt, 7, 0, 2)
        case "refused late":
            ledger.refuse(attempt)
        case _:
            ledger.end(attempt, "error")
    (found,) = ledger.wrong
    assert noted in found


def test_growth_is_from_a_quarter_of_the_refits_to_the_end() -> None:
    held = [{"refits": n, "engine_rss_bytes": n * 2**20, "engine_descriptors": 20} for n in (3, 30, 60, 120)]
    assert not_flat(held) == [f"engine_rss_bytes: {90 * 2**20} more"]
    assert not_flat([*held[:-1], {**held[-1], "engine_rss_bytes": 70 * 2**20}]) == []
    assert not_flat([*held[:2], {**held[1], "refits": 120, "engine_descriptors": 29}]) == ["engine_descriptors: 9 more"]
