"""The package is useful without Megatron-Core, and says what to install when it is not enough."""

from __future__ import annotations

import importlib
import sys

import pytest

import weft_megatron
from weft.contracts import Adapter
from weft.errors import PluginError


def without(monkeypatch: pytest.MonkeyPatch, **modules: object) -> None:
    """Forget the live half of the package, and put `modules` in the way of its imports."""
    for name in [name for name in sys.modules if name == "megatron" or name.startswith("megatron.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("weft_megatron.live", "weft_megatron.inspection", "weft_megatron.upstream"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]


def test_a_live_model_without_megatron_core_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, megatron=None)
    with pytest.raises(PluginError, match=r"pip install 'weft-megatron\[megatron\]'"):
        _ = weft_megatron.MegatronSource


def test_the_analytic_half_needs_no_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, megatron=None)
    module = importlib.reload(weft_megatron)
    adapter: Adapter = module.adapter
    assert adapter.axes == ("tp", "pp", "cp", "dp", "ep", "etp", "vpp", "first", "last", "mtp")
    assert adapter.world_size({"tp": 2, "pp": 2}) == 4


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MegatronSauce'"):
        _ = weft_megatron.MegatronSauce
