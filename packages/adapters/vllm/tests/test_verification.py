"""Verification of an engine, from the side of the process that owns it; real engines are in integration-tests."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from weft.compare import Reference, compare
from weft.errors import ConfigError
from weft.layout import LayoutBuilder
from weft.policy import Policy
from weft.verification import Request, Verifier
from weft_vllm import adapter, verification

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
