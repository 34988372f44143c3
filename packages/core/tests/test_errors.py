"""Errors cross process boundaries whole."""

from __future__ import annotations

import copy

import pytest

from weft.errors import (
    ConfigError,
    DeadlineError,
    LayoutError,
    PeerLostError,
    PlanError,
    RefitAbortedError,
    WeftError,
)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a port is a number"),
        LayoutError(["one", "two"]),
        PlanError(["one"]),
        PeerLostError("trainer/3", "its link is gone"),
        DeadlineError("an offer", 30.0, ["trainer/0"]),
        RefitAbortedError(7, ["rollout0/1: a digest differs"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_pickling_with_its_words_and_attributes(error: WeftError) -> None:
    found = copy.copy(error)  # by the protocol that pickle uses
    assert type(found) is type(error)
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))


def test_an_error_that_is_kept_keeps_no_frames() -> None:
    try:
        raise PeerLostError("trainer/3", "its link is gone") from OSError("reset")
    except PeerLostError as error:
        kept = error.again()
    assert str(kept) == "lost trainer/3: its link is gone"
    assert (kept.__traceback__, kept.__cause__, kept.__context__) == (None, None, None)
