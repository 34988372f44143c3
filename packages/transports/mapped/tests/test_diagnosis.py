"""What `weft doctor` is told about mapped memory here."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft_mapped import diagnosis
from weft_mapped.diagnosis import diagnose, scope
from weft_mapped.kernel import PTRACE_SCOPE


def test_another_process_writes_this_ones_memory(tmp_path: Path) -> None:
    (finding,) = diagnose(tmp_path)
    assert (finding.subject, finding.state) == ("process_vm_writev", "ok")


def test_what_forbids_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_WRITE", "raise OSError(1, 'Operation not permitted')")
    (finding,) = diagnose(tmp_path)
    assert finding.state == "broken"
    assert "Operation not permitted" in finding.text
    assert "seccomp" in finding.fix


@pytest.mark.parametrize(("found", "state"), [("0", "ok"), ("1", "ok"), ("2", "note"), ("3", "note")])
def test_yama_is_told(tmp_path: Path, found: str, state: str) -> None:
    assert scope(tmp_path) == []
    path = tmp_path / PTRACE_SCOPE
    path.parent.mkdir(parents=True)
    path.write_text(f"{found}\n")
    (finding,) = scope(tmp_path)
    assert (finding.subject, finding.state) == ("Yama", state)
    assert bool(finding.fix) == (state == "note")
