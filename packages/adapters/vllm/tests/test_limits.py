"""A control waits for its engine longer than the engine's workers wait for anybody: the error that names who is late
comes first.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weft.deadline import Deadline, Deadlines
from weft.installation import Installation
from weft.protocol.target import Stage
from weft_vllm import limits, steps

DEADLINES = Deadlines(rendezvous=1e1, offer=1e2, begin=1e3, move=1e4, vote=1e5, commit=1e6)
"""Sums of these tell which of them are in."""


class Waits:
    """A loop of core's in which every wait ends at its deadline, just in time; `seconds` is how long all took."""

    def __init__(self, session: Any) -> None:
        self.seconds, self.session, self.wire = 0.0, session, SimpleNamespace(pump=bool)

    def until(self, done: Any, step: Any, deadline: Deadline, what: str, late: Any) -> None:
        self.seconds += deadline.seconds
        while not done():
            order = list(Stage)
            self.session.stage = order[order.index(self.session.stage) + 1]


def installation(stage: Stage, shadow: bool, leader: bool = False) -> tuple[Installation, Waits]:
    calls = dict.fromkeys(("step", "pause", "prepare", "commit", "abort"), lambda *_: None)
    session: Any = SimpleNamespace(
        stage=stage, shadow=shadow, version=4, leader=object() if leader else None, waiting_for=list, **calls
    )
    waits: Any = Waits(session)
    account: Any = None
    return Installation(waits, session, DEADLINES, account, 0, 0), waits


def seconds_of(call: str) -> float:
    """How long a control waits for a call of its engine."""
    answers: dict[str, Any] = {"weft_state": [{"watched": None}], "update_weights": None}
    refit, answer = steps.refit(steps.Gate(), 4, "abort", DEADLINES), None
    while True:
        asked = refit.send(answer)
        if asked.name == call:
            refit.close()
            return asked.seconds
        answer = answers.get(asked.arguments.get("method", asked.name))


@pytest.mark.trap(40)
def test_the_limit_of_each_call_is_longer_than_all_waits_of_a_worker_in_it() -> None:
    fetch, waits = installation(Stage.BEGUN, shadow=True)
    fetch.fetch()
    fetching = DEADLINES.offer + waits.seconds
    assert fetching < limits.fetched(DEADLINES) < limits.begun(DEADLINES) == seconds_of("start_weight_update")

    for stage, shadow in ((Stage.BEGUN, False), (Stage.VOTED, True)):
        update, waits = installation(stage, shadow)
        update.update()
        assert 0 < waits.seconds < limits.updated(DEADLINES) == seconds_of("update_weights")

    for leader in (False, True):
        commit, waits = installation(Stage.DECIDED, shadow=False, leader=leader)
        with pytest.raises(AttributeError):  # its report: there is nothing to report of
            commit.commit()
        assert 0 < waits.seconds < limits.committed(DEADLINES) == seconds_of("finish_weight_update")


@pytest.mark.trap(40)
def test_a_trainer_waits_for_all_calls_of_the_engine() -> None:
    calls = ("start_weight_update", "update_weights", "finish_weight_update")
    assert limits.refitted(DEADLINES) == sum(map(seconds_of, calls))
    assert limits.connected(DEADLINES) > DEADLINES.rendezvous
