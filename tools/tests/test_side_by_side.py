"""Sessions two at a time: which there are, in what order, and what is printed of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distributions import ROOT
from side_by_side import FIRST, LANES, LONG, Job, jobs, listed, run_all

FILES = sorted((ROOT / "integration-tests").glob("test_*.py"))
# In place of nox: what it is told, and its end. `meet` ends when another one runs beside it.
NOX = """
import sys, time
from pathlib import Path

session, arguments = sys.argv[2], sys.argv[4:]
print(f"this is {session} with {arguments}")
if session == "meet":
    Path(arguments[0]).touch()
    until = time.monotonic() + 60
    while not Path(arguments[1]).exists():
        if time.monotonic() > until:
            sys.exit("alone")
        time.sleep(0.01)
sys.exit(3 if session == "bad" else 0)
"""


@pytest.fixture
def nox(tmp_path: Path) -> list[str]:
    program = tmp_path / "nox.py"
    program.write_text(NOX)
    return [sys.executable, str(program)]


def test_every_file_of_the_integration_tests_runs_once_and_every_other_session_too():
    found = jobs(["docs", "integration", "lint"], FILES)
    named = [argument for job in found if job.session == "integration" for argument in job.arguments]
    assert sorted(named) == [str(file) for file in FILES]
    assert {job.name for job in found if not job.arguments} == {"docs", "lint"}
    assert len(found) == 2 + 1 + len(LONG)


def test_what_takes_long_is_named_as_it_is_and_begins_first():
    assert set(LONG) <= {file.stem for file in FILES}
    order = [
        job.name for job in jobs(["wheels", "tests(vllm31)", "integration", "tests(core)", "types", "lint"], FILES)
    ]
    assert order == [*FIRST, "wheels"]


def test_nox_says_which_sessions_there_are(tmp_path: Path):
    program = tmp_path / "nox.py"
    program.write_text("import json, sys\nprint(json.dumps([{'session': name} for name in sys.argv[4:]]))")
    assert listed([sys.executable, str(program)], ["tests(core)", "lint"], tmp_path) == ["tests(core)", "lint"]


def test_two_run_at_a_time(nox: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert LANES == 2
    pair = [Job(name, "meet", (str(tmp_path / name), str(tmp_path / other))) for name, other in ("ab", "ba")]
    assert run_all(nox, pair, tmp_path) == 0
    assert "alone" not in capfd.readouterr().out


def test_what_failed_is_printed_whole_after_everything_else(
    nox: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert run_all(nox, [Job("bad", "bad"), Job("good", "good", ("x",)), Job("other", "other")], tmp_path) == 1
    printed = capfd.readouterr().out
    assert printed.count("this is") == 3
    place = printed.index("this is bad with []")
    assert place > printed.index("this is other with []")
    assert place > printed.index("this is good with ['x']")
    last = printed.splitlines()[-3:]
    assert last[2].startswith("===== bad: failed with exit code 3 after")
    assert {line.split(" after ")[0] for line in last[:2]} == {"===== good: passed", "===== other: passed"}
