"""Running one engine case of `vllm_engine/` in a process of its own, under a deadline, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_CASES = _ROOT / "integration-tests" / "vllm_engine"
VLLM_PLUGINS = _ROOT / "integration-tests" / "vllm_plugins"
"""To be on `PYTHONPATH` where an engine uses expert parallelism on CPU."""


def run_case(script: str, case: dict[str, Any], directory: Path, seconds: float = 420.0) -> dict[str, Any]:
    """Run `vllm_engine/<script>` for `case`; returns what it printed as RESULT. Raises `AssertionError` with its last
    lines.
    """
    alone = "0-1" if case.get("dp", 1) == 1 else "nobind"
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if case["tp"] * case.get("pp", 1) == 2 else alone,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(_entry_points(directory / "plugins")), str(VLLM_PLUGINS), os.environ.get("PYTHONPATH", "")]
        ),
    }
    log = directory / "case.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, str(_CASES / script), json.dumps(case), str(directory)],
            stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=_CASES, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"none within {seconds} s"
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    assert results, f"{script} ended with exit code {code}:\n" + "\n".join(lines[-60:])
    result: dict[str, Any] = json.loads(results[-1])
    return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the case and every process it started: they share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _entry_points(directory: Path) -> Path:
    """Entry points of the distributions of this tree that are not installed, as bare metadata to put on the path."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    directory.mkdir(parents=True, exist_ok=True)
    for file in _ROOT.glob("packages/**/pyproject.toml"):
        project = tomllib.loads(file.read_text())["project"]
        if project["name"] in installed:
            continue
        info = directory / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in project.get("entry-points", {}).items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups))
    return directory
