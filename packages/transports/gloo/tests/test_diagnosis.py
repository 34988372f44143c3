"""What `weft doctor` is told about gloo here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from weft.errors import ConfigError
from weft_gloo import diagnosis


@pytest.mark.parametrize(("host", "state"), [("127.0.0.1", "note"), ("192.0.2.7", "ok")])
def test_the_address_is_told(monkeypatch: pytest.MonkeyPatch, host: str, state: str) -> None:
    monkeypatch.setattr(diagnosis, "choose_host", lambda *arguments: host)
    (finding,) = diagnosis.diagnose(Path("/"))
    assert finding.state == state
    assert f"listens on {host}" in finding.text
    assert bool(finding.fix) == (state == "note")


def test_what_keeps_gloo_from_working_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*arguments: object) -> str:
        raise ConfigError("host cannot be resolved")

    monkeypatch.setattr(diagnosis, "choose_host", nowhere)
    (finding,) = diagnosis.diagnose(Path("/"))
    assert (finding.state, finding.text) == ("broken", "host cannot be resolved")
    monkeypatch.setattr(diagnosis, "dist", SimpleNamespace(is_available=lambda: False))
    (finding,) = diagnosis.diagnose(Path("/"))
    assert finding.state == "broken"
    assert "without it" in finding.text
