"""What all conformance suites share: tests that cannot be overridden, and calls that must end.

Needs pytest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, TypeVar

import pytest

Result = TypeVar("Result")


class Suite:
    """Base of the suites. A subclass inherits every test as it stands.

    Redefining one is a `TypeError` when the class is made, unless the new definition is marked
    `@pytest.mark.xfail(reason=…)`, and with nothing else. Then the suite's own test runs, strictly: it must fail until
    the mark is taken away. What the redefinition itself does is not run.
    """

    seconds: ClassVar[float] = 20.0
    """Deadline of what must succeed: long enough for a busy machine."""
    short_seconds: ClassVar[float] = 3.0
    """Deadline of waits that must fail."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        faults = []
        for name in sorted({name for kind in cls.__mro__ for name in vars(kind) if name.startswith("test_")}):
            definitions = [vars(kind)[name] for kind in cls.__mro__ if name in vars(kind)]
            mine, original = definitions[0], definitions[-1]
            code = getattr(original, "__code__", None)
            if mine is original or (code is not None and getattr(mine, "__code__", None) is code):
                continue
            reason, fault = _expected_failure(mine)
            if fault:
                faults.append(f"{name} ({fault})")
            else:
                setattr(cls, name, _marked(original, reason))
        if faults:
            raise TypeError(
                f"{cls.__name__} redefines tests of its conformance suite: {', '.join(faults)}. Delete them; where one "
                'cannot pass yet, say why with @pytest.mark.xfail(reason="…") on an empty method of its name'
            )


def within(seconds: float, what: str, call: Callable[[], Result]) -> Result:
    """What `call` returns or raises. An `AssertionError` that says `what` when it has not ended in time."""
    outcome: list[tuple[Result | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # noqa: BLE001  # raised again below
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"{what} has not ended within {seconds} s: it waits without a deadline"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None only where `call` returned it


def _expected_failure(test: object) -> tuple[str, str]:
    """The reason why a test may fail, or what is wrong with a redefinition that gives none."""
    marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
    if not isinstance(test, FunctionType) or [mark.name for mark in marks] != ["xfail"]:
        return "", "not marked xfail" if not marks else f"marked {', '.join(mark.name for mark in marks)}"
    reason = str(marks[0].kwargs.get("reason", "")).strip()
    extra = sorted(marks[0].kwargs.keys() - {"reason"})
    if marks[0].args or extra:
        return "", f"xfail takes a reason here and nothing else, not {', '.join([*map(repr, marks[0].args), *extra])}"
    return reason, "" if reason else "xfail without a reason"


def _marked(test: FunctionType, reason: str) -> FunctionType:
    """A copy of `test` that must fail; marking the test itself would mark it for everybody."""
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__dict__.update(test.__dict__)
    copy.__annotations__, copy.__qualname__, copy.__doc__ = test.__annotations__, test.__qualname__, test.__doc__
    mark = pytest.mark.xfail(reason=reason, strict=True)
    copy.__dict__["pytestmark"] = [*test.__dict__.get("pytestmark", []), mark.mark]
    return copy
