"""What `weft doctor` is told about NVSHMEM here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weft_nvshmem.diagnosis import diagnose
from weft_nvshmem.library import Library


def test_it_is_listed_as_unproven_wherever_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    unproven, here = diagnose(Path("/"))
    assert (unproven.state, unproven.text) == ("note", "transport 'nvshmem' is unproven: it never ran on a GPU")
    assert "NVSHMEM moves GPU memory" in here.text
    monkeypatch.setattr(Library, "start", lambda self, member: torch.device(member.device))
    unproven, here = diagnose(Path("/"))
    assert unproven.state == "note"
    assert (here.state, here.text) == ("ok", "imports; packs piece by piece, since Triton does not import")
