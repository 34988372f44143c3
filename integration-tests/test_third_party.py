"""docs/plugins.md holds: a third party's transport is built, installed, found, passes its suite and carries a refit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "plugins.md").read_text()
SHOWN = (
    "integration-tests/third_party/**/*.py",
    "integration-tests/third_party/pyproject.toml",
    "packages/core/tests/test_*.py",
    "packages/adapters/dtensor/tests/test_conformance.py",
)
SECONDS = 280


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command of the page printed, by its line; all ran in one shell, without a network, and succeeded."""
    folder = tmp_path_factory.mktemp("third_party") / "example"
    shutil.copytree(ROOT / "integration-tests" / "third_party", folder, ignore=shutil.ignore_patterns("__pycache__"))
    lines = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    script = "set -e\n" + "".join(f"echo '@@ {line}'\n{line}\n" for line in lines)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": "",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(part.split("\n", 1) for part in done.stdout.split("@@ ")[1:])


def test_it_is_found_by_its_entry_point_and_only_where_it_is_installed(said: dict[str, str]) -> None:
    rows = {row["name"]: row for row in json.loads(said["weft plugins --json"])}
    found = rows["example-sockets"]
    assert (found["group"], found["distribution"], found["version"]) == (
        "weft.transports",
        "example-weft-sockets",
        "1.2.3",
    )
    assert (found["state"], found["reason"]) == ("ok", "")
    here = subprocess.run([Path(sys.executable).parent / "weft", "plugins"], capture_output=True, text=True, timeout=60)
    assert "example-sockets" not in here.stdout


def test_it_passes_the_suite_with_three_lines(said: dict[str, str]) -> None:
    assert re.search(r"^(3[0-9]) passed in ", said["python -m pytest -q tests"], re.MULTILINE), said
    text = (ROOT / "integration-tests" / "third_party" / "tests" / "test_conformance.py").read_text()
    assert len(text[text.index("class ") :].splitlines()) == 3


@pytest.mark.trap(41)
def test_it_carries_a_refit_between_processes(said: dict[str, str]) -> None:
    lines = said["python refit.py"].splitlines()
    assert sorted(lines) == [
        "engine0 ended with 0",
        "trainer0 ended with 0",
        "trainer1 ended with 0",
        "version 1: 9 buffers right, 0 wrong",
        "version 2: 9 buffers right, 0 wrong",
    ]


def test_every_block_of_the_page_is_a_part_of_a_file() -> None:
    texts = [file.read_text() for pattern in SHOWN for file in ROOT.glob(pattern)]
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE, re.DOTALL)
    strange = [block for block in blocks if not any(block in text for text in texts)]
    assert len(blocks) > 8
    assert not strange, "\n---\n".join(strange)
