"""Answers questions one after the other, in a process that may hang or die over any of them.

python -m weft_cli.doctor.child ROOT FILE QUESTION…   each answer becomes a line of JSON in FILE, below an empty line
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from weft.diagnosis import GROUP, Finding
from weft.errors import PluginError
from weft.plugins import GROUPS, load


class Answer(msgspec.Struct, frozen=True):
    """To one question."""

    question: str
    findings: list[Finding]


def subject_of(question: str) -> str:
    """What a question is about, for those who read the answer."""
    group, _, name = question.partition(":")
    return f"{GROUPS[group]} {name}" if group in GROUPS else name


def answer(question: str, root: Path) -> list[Finding]:
    """`module:NAME`, a module here with a function `diagnose`; else a group and one of its plug-ins, `GROUP:NAME`."""
    group, _, name = question.partition(":")
    subject = subject_of(question)
    try:
        if group == "module":
            found = importlib.import_module(f"weft_cli.doctor.{name}").diagnose(root)
        else:
            plugin = load(group, name)
            found = plugin(root) if group == GROUP else [Finding(subject, "ok", "loads")]
        return msgspec.convert(msgspec.to_builtins(list(found)), list[Finding])
    except PluginError as error:
        return [Finding(subject, "broken", str(error), "install what it needs, or uninstall the plug-in")]
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a plug-in may raise anything
        return [Finding(subject, "broken", f"{type(error).__name__}: {error}", "report it to whoever made the plug-in")]


def main(arguments: Sequence[str]) -> None:
    root, file, *questions = arguments
    with Path(file).open("wb", buffering=0) as lines:
        lines.write(b"\n")  # everything is imported
        for question in questions:
            lines.write(msgspec.json.encode(Answer(question, answer(question, Path(root)))) + b"\n")
    os._exit(0)  # drivers and libraries that were loaded for an answer may hang while they are unloaded


if __name__ == "__main__":
    main(sys.argv[1:])
