"""The analytic side, as far as it needs no Transformers; layouts are compared with live ones in `integration-tests`."""

from __future__ import annotations

import sys

import pytest

from weft.contracts import Adapter
from weft.errors import ConfigError, NotSupportedError, PluginError
from weft_dtensor import adapter


def test_sizes_multiply_and_form_one_replica() -> None:
    typed: Adapter = adapter
    assert typed.world_size({}) == 1
    assert typed.world_size({"fsdp": 4, "replicate": 2}) == 8
    assert typed.replicas({"fsdp": 4, "replicate": 2}) == 1


@pytest.mark.trap(17)
def test_sizes_that_do_not_fit_are_named_together() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown axis 'ep', expected replicate, fsdp, tp; fsdp=0, expected at least 1"
    ):
        adapter.world_size({"ep": 2, "fsdp": 0})
    with pytest.raises(NotSupportedError, match="tp=2"):
        adapter.world_size({"tp": 2})


def test_missing_transformers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PluginError, match=r"pip install 'weft-dtensor\[transformers\]'"):
        adapter.layouts({"model_type": "qwen3"}, {"fsdp": 2}, "bfloat16")
