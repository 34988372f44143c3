"""Verification of an engine, from the side of the process that owns it; real engines are in integration-tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from weft.builder import LayoutBuilder
from weft.compare import RankComparison, Reference, compare
from weft.errors import ConfigError, LayoutError
from weft.layout import Kind, Layout
from weft.policy import Policy
from weft.verification import Request, Verifier
from weft_vllm import adapter, comparison, verification
from weft_vllm.engine import WeftWeightTransferEngine

WEIGHT = torch.arange(6, dtype=torch.float32)


class Workers:
    """Two workers, each with half of one tensor; the last one may fail."""

    def __init__(self, error: str = "") -> None:
        self.error = error

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        assert (method, args) == ("weft_verify", ("disk", [["float32", "bfloat16"]]))
        answers: list[dict[str, Any]] = []
        for start in (0, 3):
            builder = LayoutBuilder()
            builder.tensor("w", (6,), "float32")
            builder.buffer("w", "float32", 3, group="g")
            builder.shard("w", "w", start=start, stop=start + 3)
            found = compare(builder.build(), {"w": WEIGHT[start : start + 3]}, Reference({"w": WEIGHT}, {}), Policy())
            answers.append({"comparison": msgspec.to_builtins(found)})
        return [answers[0], {"error": self.error} if self.error else answers[1]]


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint without files."""
    monkeypatch.setattr(verification, "reference", lambda path: Reference({"w": WEIGHT}, {}))


def test_the_answers_of_all_workers_make_one_verdict() -> None:
    found = verification.verify_engine(Workers(), "disk", casts=[("float32", "bfloat16")])
    assert found.failures() == []
    (tensor,) = found.tensors
    assert tensor.ranks == ("worker 0", "worker 1")


def test_a_worker_that_could_not_compare_fails_the_whole_with_its_words() -> None:
    with pytest.raises(ConfigError, match="compared with disk: worker 1: LayoutError: odd"):
        verification.verify_engine(Workers("LayoutError: odd"), "disk", casts=[("float32", "bfloat16")])


@pytest.mark.parametrize("parallel", [{"tp": 1, "dp": 2}, {"tp": 2, "ep": 4}, {"ep": 2}], ids=str)
def test_an_engine_is_started_by_tp_and_an_equal_ep_alone(parallel: dict[str, int]) -> None:
    assert isinstance(adapter, Verifier)
    with pytest.raises(ConfigError, match="an ep equal to it: found"):
        adapter.verify(Request(model="m", checkpoint="disk", parallel=parallel), print)


def test_a_version_that_is_being_installed_is_not_compared() -> None:
    engine = object.__new__(WeftWeightTransferEngine)
    engine._installation = SimpleNamespace(version=3)  # type: ignore[assignment]
    assert engine.verify("disk", []) == {"error": "version 3 is being installed: verify when it is finished"}


class Derived:
    """A rank whose one tensor goes through the engine's loader."""

    recorded = SimpleNamespace(derived={"a": "-exp", "b": "-exp"})

    def layout(self) -> Layout:
        builder = LayoutBuilder()
        builder.tensor("w", (6,), "float32")
        builder.buffer("loader:w", "float32", 6, group="g", kind=Kind.SCRATCH)
        builder.shard("w", "loader:w")
        return builder.build()

    def memory(self) -> dict[str, torch.Tensor]:
        return {"loader:w": WEIGHT}


@pytest.mark.trap(70)
def test_what_loading_computes_with_is_not_compared_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "reference", lambda path: Reference({"w": WEIGHT}, {}))
    monkeypatch.setattr(comparison.VllmTarget, "from_worker", lambda *_, **__: Derived())
    answer = comparison.verify_worker(torch.nn.Module(), None, "disk", [])
    found = msgspec.convert(answer["comparison"], RankComparison, strict=False)
    (tensor,) = found.tensors
    assert tensor.unread == "loader:w: goes through the engine's own loader, which computes with it: -exp"
    assert (tensor.parts, found.tensors[0].bytes) == ((), 0)


def test_errors_of_a_worker_are_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise LayoutError(["odd"])

    monkeypatch.setattr(comparison.VllmTarget, "from_worker", refuse)
    answer = comparison.verify_worker(torch.nn.Module(), None, "disk", [])
    assert answer == {"error": "LayoutError: the layout is invalid: odd"}
