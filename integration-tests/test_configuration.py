"""The page of the user guide on configuration: file, program and commands as they stand, and tables that are true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "configuration.md").read_text()
COMMAND = str(Path(sys.executable).with_name("weft"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds the page's file."""
    (text,) = blocks('toml title="weft.toml"')
    (tmp_path / "weft.toml").write_text(text)
    return tmp_path


@pytest.fixture
def exported() -> dict[str, str]:
    """An environment with what the page exports."""
    (line,) = [block for block in blocks("console") if block.startswith("$ export ")]
    return ENVIRONMENT | dict(word.split("=", 1) for word in line.removeprefix("$ export ").split())


def test_the_program_runs(folder: Path, exported: dict[str, str]) -> None:
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=folder, env=exported, check=True, timeout=120)


def test_the_commands_print_what_the_page_says(folder: Path, exported: dict[str, str]) -> None:
    shown = [block for block in blocks("console") if "weft config" in block]
    assert len(shown) == 2
    for block in shown:
        line, *expected = block.splitlines()
        *assignments, _, _ = line.removeprefix("$ ").split()
        environment = exported | dict(word.split("=", 1) for word in assignments)
        done = subprocess.run(
            [COMMAND, "config"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == (2 if assignments else 0)
        said = [" ".join(words.split()) for words in (done.stdout + done.stderr).splitlines()]
        lines = [" ".join(words.split()) for words in expected if words != "…"]
        assert [words for words in said if words in lines] == lines
        assert "…" in block or len(said) == len(lines)


def test_the_tables_are_what_the_installed_packages_declare() -> None:
    command = [COMMAND, "config", "--explain", "--markdown"]
    made = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=120).stdout
    tables = [f"### {table}" for table in made.split("### ")[1:]]
    assert len(tables) >= 6
    stale = [table.splitlines()[0] for table in tables if table.strip() not in PAGE]
    assert not stale, f"end docs/guide/configuration.md with what `weft config --explain --markdown` prints: {stale}"


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_secret_is_there_but_not_shown(arguments: list[str]) -> None:
    environment = ENVIRONMENT | {"WEFT_SECRET": "correct horse battery staple"}
    command = [COMMAND, "config", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "Secret(…)" in done.stdout
    assert "WEFT_SECRET" in done.stdout
    assert "horse" not in done.stdout + done.stderr
    environment["WEFT_SECRET"] = "short horse"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "WEFT_SECRET: secret of the configuration is …: the job secret has 11 bytes" in done.stderr
    assert "horse" not in done.stdout + done.stderr
