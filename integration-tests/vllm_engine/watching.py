"""The part of `refit_case.py` in which the engine watches: versions land in shadow memory while it serves."""

from __future__ import annotations

import time
from typing import Any

from sources import SourceProcesses
from target_case import compare

SECONDS = 90.0
"""For what happens in another thread or process."""


def spoil_fetching(worker: Any, spoilt: bool) -> None:
    """In a worker: have its watcher fail at the first look at what it fetches, or no more."""
    watcher = worker.weight_transfer_engine._watcher

    def fail() -> None:
        raise RuntimeError("the shadow is broken")

    if spoilt:
        watcher._go_on = fail
    else:
        del watcher._go_on


def watch(case: Any) -> dict[str, Any]:
    """Join another job, with a shadow; the engine serves version "A" before. Plain values for the test."""
    policy = {**case.policy, "landing": "shadow"}
    shared = {"transport": case.init["transport"], "store": case.init["store"], "deadlines": case.init["deadlines"]}
    sources = SourceProcesses(case.case["sources"], case.weights("A"), job="watch", policy=policy, **shared)
    with sources:
        sources.send("open")
        case.llm.init_weight_transfer_engine({"init_info": {**case.init, "job": "watch", "policy": policy}})
        assert sources.answers() == ["open"] * case.case["sources"]
        return _watched(case, sources)


def _watched(case: Any, sources: SourceProcesses) -> dict[str, Any]:
    control, result = case.control, {}
    sources.send("offer", 1, case.weights("B"))
    result["during"] = []
    limit = time.monotonic() + SECONDS
    while control.ready() != 1 and time.monotonic() < limit:
        result["during"] += case.gaps("A")
    result["ready"] = control.ready()
    result["between"] = case.gaps("A")
    config = case.models["A"].config.to_dict()
    result["memory_between"] = case.llm.collective_rpc(compare, args=(str(case.directory / "A"), config))
    report = control.refit(1)
    result["seconds"], result["pause"] = dict(report.seconds), report.pause_seconds
    result["sent"], result["digest"] = sources.answers(), report.digest
    result["after"] = case.gaps("B")
    result["memory_after"] = case.llm.collective_rpc(compare, args=(str(case.directory / "B"), config))

    sources.send("hold", 2, case.weights("C"))
    result["held"] = sources.answers()
    _until(lambda: control.ready() == 2)
    sources.send("withdraw")
    sources.answers()
    result["withdrawn"] = _failure_of(control.ready)
    result["withdrawn_refit"] = case.failure(control.refit)
    result["after_withdrawal"] = case.gaps("B")

    case.llm.collective_rpc(spoil_fetching, args=(True,))
    sources.send("offer", 3, case.weights("C"))
    result["spoilt"] = _failure_of(control.ready)
    result["told"] = sources.answers()
    result["spoilt_refit"] = case.failure(control.refit)
    result["after_spoiling"] = case.gaps("B")
    case.llm.collective_rpc(spoil_fetching, args=(False,))
    sources.send("offer", 4, case.weights("C"))
    result["wrong_version"] = case.failure(lambda: control.refit(99))
    sources.answers()
    result["after_wrong_version"] = case.gaps("B")
    sources.send("offer", 5, case.weights("C"))
    result["last"] = control.refit(5).version
    sources.answers()
    result["after_last"] = case.gaps("C")
    return result


def _until(reached: Any) -> None:
    limit = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < limit, f"not within {SECONDS} s"
        time.sleep(0.01)


def _failure_of(call: Any) -> str:
    """What a call says once it fails."""
    said: list[str] = []

    def failed() -> bool:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the test asserts on what it says
            said.append(f"{type(error).__name__}: {error}")
        return bool(said)

    _until(failed)
    return said[0]
