"""What plug-ins say about the machine they are on. `weft doctor` asks each that has an entry point in group `GROUP`.

It points at a function, `Diagnose`, and is called after the distribution (`nixl`). The function is called in another
process and under a deadline, so it may load drivers and libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

GROUP = "weft.diagnoses"
"""Group of entry points. Optional: a plug-in without any is only imported."""


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
    """What an entry point of group `weft.diagnoses` points at."""

    def __call__(self, root: Path) -> Sequence[Finding]:
        """What the plug-in can do here. `root` is the folder in which `sys` and `proc` are: `/`, except in tests.

        What is absent is a finding, never an exception.
        """
        ...
