"""What `weft doctor` is told about NCCL here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from weft.errors import ConfigError
from weft_nccl import diagnosis


def test_what_is_here_or_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = diagnosis.diagnose(Path("/"))
    assert (finding.state, finding.text.partition(":")[0]) == ("note", "no CUDA device here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(diagnosis, "load", lambda name: SimpleNamespace(version=lambda: 22703))
    (finding,) = diagnosis.diagnose(Path("/"))
    assert finding.text.startswith("2.27.3; ")
    assert "never run" in finding.text

    def missing(name: str) -> None:
        raise ConfigError(f"cannot load {name}")

    monkeypatch.setattr(diagnosis, "load", missing)
    (finding,) = diagnosis.diagnose(Path("/"))
    assert (finding.state, finding.text) == ("broken", "cannot load libnccl.so.2")
    assert finding.fix
