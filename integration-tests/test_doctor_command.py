"""`weft doctor` as the guide has it, with every plug-in that is installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "when-something-goes-wrong.md"
SECONDS = 250


def test_the_commands_of_the_guide_run_and_every_plugin_answers() -> None:
    console = re.findall(r"```console\n(weft doctor.*?)\n```", PAGE.read_text())
    assert [line.split(" | ")[0] for line in console] == ["weft doctor", "weft doctor --json"]
    command = [sys.executable, "-m", "weft_cli.app", *console[1].split(" | ")[0].split()[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if report["broken"] else 0), done.stderr
    findings = {
        (section["name"].split()[0], found["subject"]): found
        for section in report["sections"]
        for found in section["findings"]
    }
    assert sum(found["state"] == "broken" for found in findings.values()) == report["broken"]
    for section, subject in (
        ("weft-core", "transport local"),
        ("weft-nixl", "transport nixl"),
        ("weft-nixl", "NIXL on cpu"),
        ("weft-nixl", "UCX"),
        ("weft-gloo", "gloo"),
        ("weft-mapped", "process_vm_writev"),
        ("weft-megatron", "Megatron-Core"),
        ("weft-vllm", "vLLM"),
    ):
        assert findings[section, subject]["state"] in ("ok", "note"), findings[section, subject]
    assert ("weft-cudamalloc", "cudaMalloc pool") in findings
