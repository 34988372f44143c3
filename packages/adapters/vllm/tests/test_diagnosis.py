"""What `weft doctor` is told about vLLM."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weft_vllm.diagnosis import diagnose


@pytest.mark.parametrize(("tested", "state"), [(True, "ok"), (False, "note")])
def test_the_installed_version_and_how_well_it_is_known_are_told(
    monkeypatch: pytest.MonkeyPatch, tested: bool, state: str
) -> None:
    compat = SimpleNamespace(support=SimpleNamespace(version="0.33.0", tested=tested), TESTED_SERIES=("0.31", "0.32"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", {"weft_vllm.compat": compat}.get)
    (finding,) = diagnose(Path("/"))
    assert finding.state == state
    assert "0.33.0" in finding.text
    assert ("0.31, 0.32" in finding.fix) == (not tested)


def test_none_is_no_fault_and_a_broken_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fails)
    (finding,) = diagnose(Path("/"))
    assert (finding.state, finding.text) == ("broken", "RuntimeError: operator torchvision::nms does not exist")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (finding,) = diagnose(Path("/"))
    assert finding.state == "note"
    assert "pip install" in finding.fix
