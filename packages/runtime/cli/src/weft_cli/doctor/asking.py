"""Asking in another process, each question under a deadline. What hangs or dies is named, the rest is asked anew."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from weft.deadline import Deadline
from weft.diagnosis import Finding
from weft.errors import DeadlineError
from weft_cli.doctor.child import Answer, subject_of

_LAST_WORDS = 300
"""Characters of a process's output that are quoted when it has died."""
_START_SECONDS = 120.0
"""At least so long may a process take to import weft and torch."""
_END_SECONDS = 5.0
"""Longest wait for a process that was killed; one that hangs in a driver stays."""


def ask(questions: Sequence[str], root: Path, seconds: float) -> dict[str, list[Finding]]:
    """The answers, by question; that one does not come within `seconds`, or kills its process, is a finding itself."""
    answers: dict[str, list[Finding]] = {}
    while left := [question for question in questions if question not in answers]:
        for answer in _of_one_process(left, root, seconds):
            answers[answer.question] = answer.findings
    return answers


def _of_one_process(questions: Sequence[str], root: Path, seconds: float) -> Iterator[Answer]:
    """Answers in order, up to and with the first question that the process does not answer."""
    with tempfile.TemporaryDirectory() as folder:
        answers, output = Path(folder, "answers"), Path(folder, "output")
        answers.touch()
        command = [sys.executable, "-m", "weft_cli.doctor.child", str(root), str(answers), *questions]
        with output.open("wb") as words:
            child = subprocess.Popen(
                command, stdout=words, stderr=words, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            if not _waited(child, answers, 0, max(seconds, _START_SECONDS)) or not _lines(answers):
                yield Answer(questions[0], [_died("weft", child.poll(), output)])
                yield from (Answer(question, []) for question in questions[1:])
                return
            for n, question in enumerate(questions, start=1):
                if not _waited(child, answers, n, seconds):
                    yield Answer(question, [_hangs(subject_of(question), seconds)])
                    return
                given = _lines(answers)
                if len(given) <= n:
                    yield Answer(question, [_died(subject_of(question), child.returncode, output)])
                    return
                yield msgspec.json.decode(given[n], type=Answer)
        finally:
            _end(child)


def _waited(child: subprocess.Popen[bytes], answers: Path, n: int, seconds: float) -> bool:
    """Whether, within the time, there is an answer n or the process has ended."""
    try:
        Deadline.after(seconds).wait(lambda: child.poll() is not None or len(_lines(answers)) > n, "an answer", list)
    except DeadlineError:
        return False
    return True


def _lines(file: Path) -> list[bytes]:
    """Those that are complete."""
    return file.read_bytes().split(b"\n")[:-1]


def _hangs(subject: str, seconds: float) -> Finding:
    fix = "if this machine is only slow, give a longer --timeout; else see which driver or library hangs (dmesg)"
    return Finding(subject, "broken", f"no answer within {seconds:g} s", fix)


def _died(subject: str, code: int | None, output: Path) -> Finding:
    """Of a process that ended without an answer; without a code, of one that never began to answer."""
    how = "hangs" if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"
    words = " ".join(output.read_text(errors="replace")[-_LAST_WORDS:].split())
    fix = "update or reinstall what it loads; its last words may name it"
    return Finding(subject, "broken", f"the process that looked at it died ({how}): {words or 'without a word'}", fix)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_END_SECONDS)
