"""`weft config`: values, origins, everything there is to configure, exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of the machine's own; relative files are the test's."""
    for name in [name for name in os.environ if name.startswith("WEFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("weft.toml").write_text('job = "j"\n[policy]\nbucket_bytes = 8_192\nonly = ["a.*", "b"]\n')


def test_every_value_is_shown_with_its_origin(weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_DEADLINES_VOTE", "7")
    monkeypatch.setenv("WEFT_SERVICE_HOST", "10.0.0.1")
    code, out, _ = weft("config", "--file", "weft.toml", "--json")
    assert code == 0
    found = json.loads(out)
    origins = {one["key"]: (one["value"], one["origin"]) for one in found["values"]}
    assert origins["job"] == ("j", "weft.toml")
    assert origins["policy.only"] == (["a.*", "b"], "weft.toml")
    assert origins["deadlines.vote"] == (7.0, "WEFT_DEADLINES_VOTE")
    assert origins["policy.relay"] == ("never", "default")
    assert found["unread"] == ["WEFT_SERVICE_HOST"]
    _, out, _ = weft("config", "--file", "weft.toml")
    rows = [line.split() for line in out.splitlines()]
    assert ["policy.bucket_bytes", "8,192", "weft.toml"] in rows
    assert ["policy.only", "a.*,", "b", "weft.toml"] in rows
    assert out.splitlines()[-1] == "not read: WEFT_SERVICE_HOST"


def test_a_variable_names_the_file(weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CONFIG", "weft.toml")
    assert ["job", "j", "weft.toml"] in [line.split() for line in weft("config")[1].splitlines()]


@pytest.mark.trap(60)
def test_a_wrong_configuration_is_refused_with_every_fault(weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_POLICY_RELAY", "rack")
    Path("weft.toml").write_text("jobs = 1\n")
    code, out, err = weft("config", "--file", "weft.toml")
    assert (code, out) == (2, "")
    assert "no option jobs; did you mean 'job'?" in err
    assert "'rack' is none of never, host, domain" in err
    assert weft("config", "--markdown")[0] == 2


def test_everything_is_explained_with_type_unit_range_default_and_variable(weft) -> None:
    rows = json.loads(weft("config", "--explain", "--json")[1])
    (row,) = [row for row in rows if row["variable"] == "WEFT_POLICY_BUCKET_BYTES"]
    assert row == {
        "section": "policy", "transport": None, "name": "bucket_bytes", "variable": "WEFT_POLICY_BUCKET_BYTES",
        "type": "whole number", "unit": "bytes", "range": "at least 4,096", "required": False, "default": 16 << 20,
        "documentation": "Upper bound of one bucket.",
    }  # fmt: skip
    assert [row["name"] for row in rows if row["required"] and not row["transport"]] == ["sources", "replicas"]
    _, out, _ = weft("config", "--explain")
    described = (
        "  bucket_bytes  (whole number, bytes, at least 4,096, default 16,777,216)  WEFT_POLICY_BUCKET_BYTES\n"
        "      Upper bound of one bucket.\n"
    )
    assert described in out
    assert "| `bucket_bytes` | whole number | bytes | at least 4,096 | `16,777,216` | Upper bound of one bucket. |" in (
        weft("config", "--explain", "--markdown")[1].splitlines()
    )
