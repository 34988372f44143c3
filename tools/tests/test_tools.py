"""The tools themselves: constraints, traps, bump."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bump import bump
from constraints import render
from distributions import ROOT, Package, closure, discover
from traps import marked, traps


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_dev_alone_says_what_there_is():
    done = run("tools/dev.py")
    assert done.returncode == 0
    for command in ("demo", "test", "lint", "gpu"):
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize(("argument", "text"), [("tset", "unknown command 'tset'"), ("--fast", "unknown option")])
def test_dev_refuses_in_one_line(argument: str, text: str):
    done = run("tools/dev.py", argument)
    assert done.returncode == 1
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_two_versions_in_one_environment_are_an_error():
    with pytest.raises(SystemExit, match=r"environment x has A_b==1 and a-b==2"):
        render("x", ["one", "two"], {"one": ["A_b==1"], "two": ["a-b==2"]})


def test_only_exact_pins():
    with pytest.raises(SystemExit, match="no exact pin"):
        render("x", ["one"], {"one": ["numpy>=2"]})


def test_bump_moves_versions_and_sibling_pins_alone(tmp_path: Path):
    folder = tmp_path / "packages" / "gloo"
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        'version = "0.1.0"\nx = ["weft-core==0.1.0", "weft-a[b]==0.1.0", "torch==0.1.0"]\n'
    )
    bump([Package(folder, {})], "0.2.0rc1")
    expected = 'version = "0.2.0rc1"\nx = ["weft-core==0.2.0rc1", "weft-a[b]==0.2.0rc1", "torch==0.1.0"]\n'
    assert (folder / "pyproject.toml").read_text() == expected


def test_closure_puts_dependencies_first():
    for package in discover():
        names = [each.name for each in closure(package)]
        assert names[0] == "weft-core"
        assert names[-1] == package.name


def test_the_trap_list_is_whole():
    assert list(traps()) == list(range(1, 76))


def test_marks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "test_x.py"
    file.write_text(
        "import pytest\n\npytestmark = pytest.mark.trap(1)\n\n\n@pytest.mark.trap(2, 3)\ndef test_a(): ...\n\n\n"
        "@pytest.mark.trap(4)\nclass TestB:\n    @pytest.mark.trap(5)\n    def test_c(self): ...\n"
    )
    monkeypatch.setattr("traps.ROOT", tmp_path)
    assert sorted(marked(file)) == [
        (1, "test_x.py"),
        (2, "test_x.py::test_a"),
        (3, "test_x.py::test_a"),
        (4, "test_x.py::TestB"),
        (5, "test_x.py::TestB::test_c"),
    ]
