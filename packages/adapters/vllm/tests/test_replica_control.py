"""The replica control, on an engine that only notes what it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import weft_vllm
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, RefitAbortedError
from weft_vllm import limits


class FakeCore:
    def __init__(self, backend: str | None = "weft") -> None:
        transfer = None if backend is None else SimpleNamespace(backend=backend)
        self.vllm_config = SimpleNamespace(weight_transfer_config=transfer)

    def add_request(self, request: str) -> str:
        return f"accepted {request}"

    def reset_encoder_cache(self) -> None:
        return None


class FakeLLM:
    """What `VllmControl` uses of a `vllm.LLM`; `fail` names the call that raises, with `fault` where that is given."""

    def __init__(self, versions: tuple[int, ...] = (4, 4)) -> None:
        self.llm_engine = FakeCore()
        self.calls: list[str] = []
        self.fail = ""
        self.fault: BaseException | None = None
        self.versions = versions
        self.cache_is_free = True
        self.watched: list[dict[str, Any] | None] = [None, None]
        self.touched = True
        self.dead = False

    def generate(self, prompt: str) -> str:
        return self.llm_engine.add_request(prompt)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.dead and call == "weft_abort":
            raise RuntimeError("engine is dead")
        if call == self.fail and self.fault is not None:
            raise self.fault
        if call == self.fail:
            raise RuntimeError(f"{call} failed on 1 of 2 workers: worker 1: boom")

    def sleep(self, level: int, mode: str) -> None:
        self._note(f"sleep {level} {mode}")

    def wake_up(self, tags: list[str]) -> None:
        self._note(f"wake_up {tags[0]}")

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self._note("reset_prefix_cache")
        return self.cache_is_free

    def start_weight_update(self) -> None:
        self._note("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        self._note("update")

    def finish_weight_update(self) -> None:
        self._note("finish")

    def update_weight_version(self, new_version: str) -> None:
        self._note(f"version {new_version}")

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        self._note(method)
        if method == "weft_state":
            return [{"watched": watched, "touched": self.touched} for watched in self.watched]
        refit = {"digest": "d", "bytes": 10, "seconds": {"wire": 1.0}, "registrations": 0}
        return [{"version": version, "refit": refit} for version in self.versions]


@pytest.mark.trap(43, 57)
def test_a_refit_pauses_first_and_forgets_caches_before_it_serves() -> None:
    llm = FakeLLM()
    report = weft_vllm.control(llm).refit(4)
    assert llm.calls == [
        "weft_state", "sleep 0 abort", "start", "update", "finish", "weft_report", "version 4", "reset_prefix_cache",
        "wake_up scheduling",
    ]  # fmt: skip
    assert (report.version, report.digest, report.nbytes, report.seconds) == (4, "d", 20, {"wire": 1.0})
    assert llm.generate("hello") == "accepted hello"


@pytest.mark.trap(48)
@pytest.mark.parametrize("step", ["update", "finish", "weft_report", "reset_prefix_cache"])
def test_after_a_failure_that_may_have_written_requests_are_refused_until_a_whole_version_is_in(step: str) -> None:
    llm = FakeLLM()
    control = weft_vllm.control(llm)
    llm.fail = step
    with pytest.raises(RuntimeError, match="worker 1: boom"):
        control.refit()
    assert "weft_abort" in llm.calls
    with pytest.raises(weft_vllm.RefusedError, match="boom"):
        llm.generate("hello")
    llm.fail = "start"
    with pytest.raises(RuntimeError):
        control.refit()
    with pytest.raises(weft_vllm.RefusedError, match="boom"):
        llm.generate("hello")
    llm.fail = ""
    control.refit()
    assert llm.generate("hello") == "accepted hello"


def test_a_failure_before_anything_was_written_leaves_the_old_version_serving() -> None:
    llm = FakeLLM()
    llm.fail, llm.touched = "start", False
    with pytest.raises(RuntimeError):
        weft_vllm.control(llm).refit()
    assert llm.generate("hello") == "accepted hello"


@pytest.mark.trap(48)
def test_an_update_that_began_in_some_workers_only_makes_the_engine_refuse() -> None:
    llm = FakeLLM()
    llm.fail = "start"
    with pytest.raises(RuntimeError):
        weft_vllm.control(llm).refit()
    with pytest.raises(weft_vllm.RefusedError, match=r"mixed with older ones: .*start failed on 1 of 2 workers"):
        llm.generate("hello")


@pytest.mark.trap(48)
@pytest.mark.parametrize("step", ["start", "update", "finish", "weft_report", "reset_prefix_cache"])
@pytest.mark.parametrize("touched", [False, True])
def test_after_an_interruption_requests_are_refused_until_a_whole_version_is_in(step: str, touched: bool) -> None:
    llm = FakeLLM()
    control = weft_vllm.control(llm)
    llm.fail, llm.fault, llm.touched = step, KeyboardInterrupt("by hand"), touched
    with pytest.raises(KeyboardInterrupt):
        control.refit()
    assert llm.calls[-1] == step, "who interrupts does not wait for more calls"
    with pytest.raises(weft_vllm.RefusedError, match="KeyboardInterrupt: by hand"):
        llm.generate("hello")
    llm.fail, llm.fault = "start", None
    with pytest.raises(RuntimeError, match="start"):
        control.refit()
    assert "wake_up scheduling" not in llm.calls
    with pytest.raises(weft_vllm.RefusedError, match="mixed"):
        llm.generate("hello")
    llm.fail = ""
    control.refit()
    assert llm.generate("hello") == "accepted hello"


@pytest.mark.trap(48)
def test_an_interruption_between_two_calls_refuses_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    control = weft_vllm.control(llm)

    def interrupted(gate: Any, *_: Any) -> Any:
        real = steps(gate, None, "abort", Deadlines())

        class Calls:
            def __next__(self) -> Any:
                return next(real)

            def send(self, answer: Any) -> Any:
                if llm.calls[-1] == "update":
                    raise KeyboardInterrupt
                return real.send(answer)

            close = staticmethod(real.close)

        return Calls()

    steps = weft_vllm.steps.refit
    monkeypatch.setattr(weft_vllm.steps, "refit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        control.refit()
    assert "mixed" in (control._gate.refused or "")


@pytest.mark.trap(48)
def test_a_failure_after_workers_have_committed_refuses_though_they_are_whole() -> None:
    llm = FakeLLM()
    llm.fail, llm.touched = "reset_prefix_cache", False
    with pytest.raises(RuntimeError):
        weft_vllm.control(llm).refit()
    with pytest.raises(weft_vllm.RefusedError, match="reset_prefix_cache"):
        llm.generate("hello")


def test_an_engine_that_cannot_even_give_up_refuses() -> None:
    llm = FakeLLM()
    control = weft_vllm.control(llm)
    llm.fail = "start"
    llm.dead = True
    with pytest.raises(RuntimeError, match="start"):
        control.refit()
    assert "engine is dead" in str(control.refusing)


@pytest.mark.trap(46, 58)
def test_workers_with_different_versions_are_an_error_and_not_served() -> None:
    llm = FakeLLM(versions=(4, 3))
    with pytest.raises(RefitAbortedError, match="worker 1 serves version 3"):
        weft_vllm.control(llm).refit()
    with pytest.raises(weft_vllm.RefusedError):
        llm.generate("hello")


@pytest.mark.trap(57)
def test_a_prefix_cache_that_could_not_be_reset_is_an_error() -> None:
    llm = FakeLLM()
    llm.cache_is_free = False
    with pytest.raises(weft_vllm.RefusedError, match="prefix cache"):
        weft_vllm.control(llm).refit()
    assert weft_vllm.control(llm) is not None


def test_requests_to_a_paused_engine_are_an_error_instead_of_waiting_for_ever() -> None:
    llm = FakeLLM()
    control = weft_vllm.control(llm)
    control.pause()
    with pytest.raises(weft_vllm.RefusedError, match="paused"):
        llm.generate("hello")
    control.resume(1)
    assert llm.generate("hello") == "accepted hello"


def test_an_engine_with_another_backend_has_no_control() -> None:
    for backend in ("nccl", None):
        llm = FakeLLM()
        llm.llm_engine = FakeCore(backend)
        with pytest.raises(ConfigError, match=str(backend)):
            weft_vllm.control(llm)


def test_a_pause_that_fails_leaves_the_engine_open() -> None:
    llm = FakeLLM()
    llm.fail = "sleep 0 abort"
    with pytest.raises(RuntimeError, match="sleep"):
        weft_vllm.control(llm).refit()
    assert llm.generate("hello") == "accepted hello"


@pytest.mark.trap(40)
def test_a_pause_that_took_too_long_is_undone_and_raised() -> None:
    llm = FakeLLM()
    with pytest.raises(DeadlineError, match="pausing"):
        weft_vllm.control(llm).pause("wait", Deadline.after(0.0))
    assert llm.generate("hello") == "accepted hello"


def fetched(stage: str, version: int | None = None, error: str | None = None) -> dict[str, Any]:
    return {"stage": stage, "version": version, "error": error}


@pytest.mark.trap(46, 51)
def test_ready_means_that_all_workers_have_fetched_one_version() -> None:
    llm = FakeLLM()
    control = weft_vllm.control(llm)
    assert control.ready() is None, "nobody watches"
    for watched, ready in (
        ([fetched("ready", 4), fetched("fetching", 4)], None),
        ([fetched("ready", 4), fetched("ready", 5)], None),
        ([fetched("ready", 4), fetched("ready", 4)], 4),
    ):
        llm.watched = list(watched)
        assert control.ready() == ready
    llm.watched = [fetched("ready", 4), fetched("failed", 4, "PeerLostError: gone")]
    with pytest.raises(RefitAbortedError, match="worker 1: PeerLostError: gone"):
        control.ready()


@pytest.mark.trap(51)
def test_an_engine_whose_workers_watch_is_paused_only_once_all_have_fetched() -> None:
    llm = FakeLLM()
    llm.watched = [fetched("fetching", 4), fetched("ready", 4)]
    asked = iter(range(3))

    def note(call: str) -> None:
        llm.calls.append(call)
        if call == "weft_state" and next(asked) == 2:
            llm.watched = [fetched("ready", 4)] * 2

    llm._note = note  # type: ignore[method-assign]
    weft_vllm.control(llm).refit(4)
    assert llm.calls[:5] == ["weft_state"] * 3 + ["sleep 0 abort", "start"]


@pytest.mark.trap(48)
def test_a_failure_to_fetch_is_raised_once_all_know_of_it_and_pauses_nothing() -> None:
    llm = FakeLLM()
    llm.watched = [fetched("failed", 4, "PeerLostError: gone"), fetched("fetching", 4)]
    asked = iter(range(3))

    def note(call: str) -> None:
        llm.calls.append(call)
        if call == "weft_state" and next(asked) == 1:
            llm.watched[1] = fetched("failed", 4, "PeerLostError: gone as well")

    llm._note = note  # type: ignore[method-assign]
    with pytest.raises(RefitAbortedError, match=r"(?s)worker 0: .*worker 1: PeerLostError: gone as well"):
        weft_vllm.control(llm).refit()
    assert llm.calls == ["weft_state", "weft_state", "weft_abort"]
    assert llm.generate("hello") == "accepted hello"


@pytest.mark.trap(40)
def test_waiting_for_workers_to_fetch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_ON_THE_WAY_SECONDS", 0.01)
    llm = FakeLLM()
    llm.watched = [fetched("waiting"), fetched("waiting")]
    brief = Deadlines(offer=0.01, begin=0.01, move=0.01, vote=0.01)
    with pytest.raises(DeadlineError, match="worker 1: waiting"):
        weft_vllm.control(llm).refit(deadlines=brief)
    assert llm.generate("hello") == "accepted hello"


@pytest.mark.trap(48)
@pytest.mark.parametrize("touched", [False, True])
def test_with_a_shadow_a_failure_makes_the_engine_refuse_only_where_weights_were_touched(touched: bool) -> None:
    llm = FakeLLM()
    llm.watched, llm.touched, llm.fail = [fetched("ready", 4)] * 2, touched, "update"
    with pytest.raises(RuntimeError, match="boom"):
        weft_vllm.control(llm).refit()
    if touched:
        assert llm.calls[-1] == "sleep 0 abort", "what was kept must not go on with a mixture"
        with pytest.raises(weft_vllm.RefusedError, match="boom"):
            llm.generate("hello")
    else:
        assert llm.generate("hello") == "accepted hello"
