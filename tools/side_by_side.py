"""Runs nox sessions two at a time, for `tools/dev.py test`. Standard library only.

Most tests wait for processes or keep one core busy, so that two sessions side by side take little longer than one.
Every session is a process of its own; what it prints goes to a file and is shown in one piece when it has ended. The
integration tests, which take longer than all else, are several sessions here: one for each file of `LONG`, and one for
all other files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

LANES = 2
"""More would not fit into the memory of a small machine: a session may hold an engine and a dozen ranks."""
LONG = (
    "test_matrix",
    "test_vllm_refit",
    "test_vllm_target",
    "test_demo",
    "test_faults",
    "test_verify",
    "test_megatron_layouts",
    "test_megatron_outputs",
)
"""Files of integration tests that take a minute or more."""
PRINTED = Path(".nox") / "printed"
"""Where a session's output is while it runs."""
FIRST = ("lint", "types", "tests(core)", "tests(vllm31)", "integration", *(f"integration({name})" for name in LONG))
"""What takes long, longest first, behind what shows the most frequent mistakes: no long one is left for the end."""


@dataclass(frozen=True)
class Job:
    """A nox session, and what follows `--`."""

    name: str
    session: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """How a job ended, after how many seconds, and everything it printed."""

    job: Job
    code: int
    seconds: float
    printed: str

    def __str__(self) -> str:
        end = f"failed with exit code {self.code}" if self.code else "passed"
        return f"{self.job.name}: {end} after {self.seconds:.0f} s"


def jobs(sessions: Iterable[str], files: Iterable[Path]) -> list[Job]:
    """A job for each session, but for `integration` one for each file of `LONG` among `files` and one for the rest."""
    found = []
    for session in sessions:
        if session != "integration":
            found.append(Job(session, session))
            continue
        rest = tuple(str(file) for file in sorted(files) if file.stem not in LONG)
        found.append(Job(session, session, rest))
        found += [Job(f"{session}({file.stem})", session, (str(file),)) for file in files if file.stem in LONG]
    return sorted(found, key=lambda job: FIRST.index(job.name) if job.name in FIRST else len(FIRST))


def listed(nox: Sequence[str], sessions: Sequence[str], folder: Path) -> list[str]:
    """The sessions that nox makes of these names: of `tests` one for each package."""
    command = [*nox, "--list", "--json", "-s", *sessions]
    answer = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE)
    return [each["session"] for each in json.loads(answer.stdout)]


def run_job(nox: Sequence[str], job: Job, folder: Path) -> Done:
    """Runs a job to its end."""
    environment = {
        **os.environ,
        # Sessions would write the same cache, and a failure to write is a warning, which fails a test.
        "PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} -p no:cacheprovider",
        # Threads of OpenMP wait for each other in loops, on cores that the other session could use: ten times the work.
        "OMP_WAIT_POLICY": "passive",
    }
    started = time.monotonic()
    file = folder / PRINTED / f"{job.name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"===== {job.name}: started", flush=True)
    with file.open("wb") as output:
        code = subprocess.run(
            [*nox, "-s", job.session, "--", *job.arguments],
            cwd=folder,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        ).returncode
    return Done(job, code, time.monotonic() - started, file.read_text("utf-8", errors="replace"))


def run_all(nox: Sequence[str], planned: Sequence[Job], folder: Path) -> int:
    """Runs the jobs, prints what each has printed, those that failed last; 1 if one has failed."""
    sys.stdout.reconfigure(errors="replace")  # not every terminal knows the boxes that some tools draw
    print(f"{len(planned)} sessions, {LANES} at a time; each is shown when it has ended, failed ones last;", flush=True)
    print(f"what a running one prints is in {PRINTED}", flush=True)
    done = []
    with ThreadPoolExecutor(LANES) as lanes:
        running = [lanes.submit(run_job, nox, job, folder) for job in planned]
        try:
            for future in as_completed(running):
                ended = future.result()
                done.append(ended)
                print(f"\n===== {ended}\n{'' if ended.code else ended.printed}", flush=True)
        except KeyboardInterrupt:  # which the running ones have got as well
            lanes.shutdown(cancel_futures=True)
            raise
    failed = [ended for ended in done if ended.code]
    for ended in failed:
        print(f"\n===== {ended}\n{ended.printed}")
    for ended in [*(ended for ended in done if not ended.code), *failed]:
        print(f"===== {ended}")
    return 1 if failed else 0
