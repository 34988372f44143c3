"""What `weft doctor` is told about Megatron-Core here."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from weft_megatron.diagnosis import diagnose


def test_the_installed_version_is_told() -> None:
    (finding,) = diagnose(Path("/"))
    assert (finding.subject, finding.state) == ("Megatron-Core", "ok")
    assert finding.text.startswith("0.16.")


def test_none_is_no_fault_and_a_broken_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise RuntimeError("a library is missing")

    monkeypatch.setattr(importlib, "import_module", fails)
    (finding,) = diagnose(Path("/"))
    assert (finding.state, finding.text) == ("broken", "RuntimeError: a library is missing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (finding,) = diagnose(Path("/"))
    assert finding.state == "note"
    assert "pip install" in finding.fix
