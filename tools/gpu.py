#!/usr/bin/env python3
"""Runs the tests marked `gpu` from the source tree, on a machine where nothing of weft is installed.

Needs a python3 with torch (CUDA), numpy, msgspec, pytest, hypothesis and NIXL, and a C compiler; says what is missing.
Arguments go to pytest. `nox -s gpu` does the same in environments of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDAMALLOC = ROOT / "packages" / "allocators" / "cudamalloc"
NEEDED = ("torch", "numpy", "msgspec", "pytest", "hypothesis")
NIXL = ("nixl_cu13", "nixl_cu12")


def entry_points(project: dict[str, object], folder: Path) -> None:
    """Make a distribution's entry points visible without installing it."""
    metadata = folder / f"{str(project['name']).replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project.get("entry-points", {})
    assert isinstance(groups, dict)
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


def main() -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not any(importlib.util.find_spec(name) for name in NIXL):
        missing.append(" or ".join(NIXL))
    if missing:
        print(f"{sys.executable} has no {', '.join(missing)}: install them, or carry their wheels", file=sys.stderr)
        return 2
    if subprocess.run([sys.executable, str(CUDAMALLOC / "compile_pool.py")], check=False).returncode:
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folders = [temporary]
        for file in sorted(ROOT.glob("packages/**/pyproject.toml")):
            entry_points(tomllib.loads(file.read_text())["project"], Path(temporary))
            folders.append(str(file.parent / "src"))
        path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
        tests = [
            str(file) for folder in ("packages", "integration-tests") for file in (ROOT / folder).rglob("test_gpu.py")
        ]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *tests, *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
