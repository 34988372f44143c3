"""Megatron-Core models keep the contracts of sources and targets."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core")
from support.megatron_suites import run
from support.processes import run_ranks


def test_dense_models_and_mixtures_pass_the_suites(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (code,) = run_ranks(run, 1, str(tmp_path / "rendezvous"))
    assert code == 0, capfd.readouterr().out
