"""What plug-ins say about the machine they are on. `weft doctor` asks each that is installed.

The module that an entry point names may have a function `diagnose(root)`; its name and signature are the whole
contract (`Diagnose`). It runs in a process of its own with a deadline, so it may load drivers and libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    subject: str
    """What it is about, in a word or two: `UCX`, `memory lock`."""
    state: Literal["ok", "note", "broken"]
    """`note` is worth knowing, and may be wanted; `broken` keeps something from working, or from working well."""
    text: str
    """What was found."""
    fix: str = ""
    """What to do about it, in one line; every `broken` has one."""


class Diagnose(Protocol):
    """The function `diagnose` of a plug-in's module."""

    def __call__(self, root: Path) -> Sequence[Finding]:
        """What the plug-in can do here. `root` is the folder in which `sys` and `proc` are: `/`, except in tests.

        What is absent is a finding, never an exception.
        """
        ...
