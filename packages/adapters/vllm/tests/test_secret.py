"""The job's secret reaches a worker by its environment, and by nothing that vLLM carries or logs."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from weft.authentication import Secret
from weft_vllm import engine
from weft_vllm.engine import WeftInitInfo, WeftWeightTransferEngine

WORDS = "correct horse battery staple"


class Asked(Exception):
    """What a `Refit` was made with."""


def asked(**arguments: Any) -> None:
    raise Asked(arguments["secret"])


@pytest.mark.parametrize("words", [WORDS, None])
def test_the_worker_takes_the_secret_from_its_environment(monkeypatch: pytest.MonkeyPatch, words: str | None) -> None:
    monkeypatch.delenv("WEFT_SECRET_FILE", raising=False)
    monkeypatch.delenv("WEFT_SECRET", raising=False)
    if words:
        monkeypatch.setenv("WEFT_SECRET", words)
    monkeypatch.setattr(engine, "Refit", asked)
    monkeypatch.setattr(engine.VllmTarget, "from_worker", lambda *_, **__: None)
    worker: Any = object.__new__(WeftWeightTransferEngine)
    worker.model = worker.vllm_config = None
    worker.parallel_config = SimpleNamespace(data_parallel_size=1, rank=0, world_size=1)
    with pytest.raises(Asked) as found:
        worker.init_transfer_engine(WeftInitInfo(store="tcp://h:1", job="j", replica="r", sources=1))
    assert found.value.args == (Secret(words) if words else None,)
    assert not [field.name for field in dataclasses.fields(WeftInitInfo) if "secret" in field.name]
