"""Plug-ins that break their contract, each in one way: the conformance suites must find every one of them.

A suite that is changed is run against them again (`packages/core/tests/test_suites.py`). Never use them for anything
else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken plug-in and how its suite must find it."""

    plugin: str
    """Its name in the module: a factory, a URL scheme or a class."""
    test: str
    """The test of the suite that is about this fault."""
    says: str
    """Words that the failure of that test must contain."""
    seconds: float = 20.0
    """The suite's deadline for it: short where the fault is to outlast it."""
