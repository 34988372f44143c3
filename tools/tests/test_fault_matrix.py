"""The page of the fault matrix says what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest

import fault_matrix


def test_the_page_is_made_from_the_table():
    assert fault_matrix.main(["--check"]) == 0


def test_another_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "page.md"
    page.write_text(fault_matrix.PAGE.read_text().replace("committed", "lost", 1))
    monkeypatch.setattr(fault_matrix, "PAGE", page)
    assert fault_matrix.main(["--check"]) == 1
    assert "run python3 tools/fault_matrix.py" in capsys.readouterr().out
    assert fault_matrix.main([]) == 0
    assert fault_matrix.main(["--check"]) == 0
