"""Replica controls of vLLM engines, offline and asynchronous: pause, caches, resume, refusal, and whole refits."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Any

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError
from weft.verification import Verification
from weft_vllm import steps
from weft_vllm.steps import Call, Calls, Gate, RefusedError, ReplicaReport
from weft_vllm.verification import verify_engine

_PAUSE_SECONDS = 3600.0
"""For a pause whose caller names no deadline."""


class VllmControl:
    """Implements `weft.contracts.ReplicaControl` for a `vllm.LLM`. For the thread that owns the `LLM`.

    While the engine is paused or refusing, `generate`, `chat` and every other way of adding requests raise
    `RefusedError`; vLLM itself would queue them for ever.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._accept = llm.llm_engine.add_request
        self._mode = "abort"
        self._gate = Gate()
        llm.llm_engine.add_request = self._add_request

    @property
    def refusing(self) -> str | None:
        """Why the engine takes no requests, or None when it does."""
        return self._gate.refused or self._gate.paused

    def _add_request(self, *args: Any, **kwargs: Any) -> Any:
        if self.refusing is not None:
            raise RefusedError(f"the engine takes no requests: {self.refusing}")
        return self._accept(*args, **kwargs)

    def pause(self, mode: str = "abort", deadline: Deadline | None = None) -> None:
        """Stop scheduling. `mode` (`abort`, `wait`, `keep`) says what becomes of running requests.

        vLLM's call has no deadline of its own; when it took longer than `deadline` allows, scheduling resumes and
        `DeadlineError` is raised.
        """
        self._mode = mode
        self._perform(steps.pause(self._gate, mode, _PAUSE_SECONDS if deadline is None else deadline.remaining()))

    def invalidate_caches(self, version: int) -> None:
        """Forget the prefix cache and the encoder cache. Raises `RefusedError` when vLLM could not: blocks are still in
        use.
        """
        self._perform(steps.forget_caches(version, self._mode))

    def resume(self, version: int) -> None:
        """Schedule again. Raises `RefusedError` where the engine refuses and not all workers have `version` whole: then
        it goes on refusing, and requests that were kept wait on, until a whole version is in (`refit`).
        """
        self._perform(steps.resume(self._gate, version))

    def refuse(self, reason: str) -> None:
        """Take no requests until a whole version is in; they raise `RefusedError` with the reason."""
        self._gate.refuse(reason)

    def ready(self) -> int | None:
        """The version that all workers have fetched beside what they serve and voted for, or None: `refit` would only
        have to copy it over. Without a landing in shadow memory always None.

        Raises `RefitAbortedError` with the workers' reasons when fetching has failed; the engine serves what it served.
        """
        return steps.ready(self._llm.collective_rpc("weft_state"))

    def refit(
        self, version: int | None = None, *, mode: str = "abort", deadlines: Deadlines | None = None
    ) -> ReplicaReport:
        """Install the version that the sources offer: pause, begin, update, commit, forget caches, resume. Where it
        lands in shadow memory, the engine is paused only once all workers have fetched it.

        `version`, when given, must be the offered one. A failure is raised again. When nothing that is served has
        changed (no offer in time, say, or fetching failed) the engine goes on serving what it served; else it refuses
        until a later refit succeeds. So it does when this one is interrupted: the next one then gives that up, and may
        fail for it.
        """
        self._mode = mode
        report: ReplicaReport = self._perform(steps.refit(self._gate, version, mode, deadlines or Deadlines()))
        return report

    def verify(self, path: str, *, casts: Sequence[tuple[str, str]] = (), ignore: Sequence[str] = ()) -> Verification:
        """What all workers hold against the safetensors checkpoint at `path`: `failures()` of the result is empty when
        every tensor is equal. Between refits; only reads. Arguments and errors as for `verify_engine`.
        """
        return verify_engine(self._llm, path, casts=casts, ignore=ignore)

    def _perform(self, calls: Calls) -> Any:
        return steps.perform(calls, self._answer)

    def _answer(self, call: Call) -> Any:
        if call.name == "pause":
            time.sleep(call.arguments["seconds"])
            return None
        owner = self._llm if hasattr(self._llm, call.name) else self._llm.llm_engine
        return getattr(owner, call.name)(**call.arguments)


class AsyncVllmControl:
    """The same for a `vllm.v1.engine.async_llm.AsyncLLM`, while its requests run. For the event loop that it runs in;
    one refit at a time.

    Requests that come during a pause wait, and are served by what comes after it. While the engine refuses they raise
    `RefusedError`, and it schedules nothing.
    """

    def __init__(self, engine: Any, every_engine: Callable[..., Awaitable[list[Any]]]) -> None:
        """`every_engine` asks each data-parallel engine (`weft_vllm.compat.every_engine`)."""
        self._engine, self._every_engine = engine, every_engine
        self._accept = engine.add_request
        self._mode = "abort"
        self._gate = Gate()
        engine.add_request = self._add_request
        for name in ("generate", "encode"):  # which would hide the reason in an error of vLLM's own
            setattr(engine, name, self._checked(getattr(engine, name)))

    @property
    def refusing(self) -> str | None:
        """Why the engine takes no requests, or None when it does."""
        return self._gate.refused

    def _check(self) -> None:
        if self.refusing is not None:
            raise RefusedError(f"the engine takes no requests: {self.refusing}")

    def _checked(self, answers: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(answers)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check()
            return answers(*args, **kwargs)

        return checked

    async def _add_request(self, *args: Any, **kwargs: Any) -> Any:
        self._check()
        return await self._accept(*args, **kwargs)

    async def pause(self, mode: str = "abort", deadline: Deadline | None = None) -> None:
        """Stop scheduling. Requests that run end as aborted (`abort`), are finished first (`wait`), or go on after
        `resume` (`keep`).

        Raises `DeadlineError`, and schedules again, when that takes longer than `deadline` allows.
        """
        self._mode = mode
        await self._perform(steps.pause(self._gate, mode, _PAUSE_SECONDS if deadline is None else deadline.remaining()))

    async def invalidate_caches(self, version: int) -> None:
        """Forget the prefix cache and the encoder cache, and what requests that were kept have computed. Raises
        `RefusedError` when vLLM could not.
        """
        await self._perform(steps.forget_caches(version, self._mode))

    async def resume(self, version: int) -> None:
        """Schedule again. Raises `RefusedError` where the engine refuses and not all workers have `version` whole: then
        it goes on refusing, and requests that were kept wait on, until a whole version is in (`refit`).
        """
        await self._perform(steps.resume(self._gate, version))

    def refuse(self, reason: str) -> None:
        """Take no requests until a whole version is in; they raise `RefusedError` with the reason."""
        self._gate.refuse(reason)

    async def ready(self) -> int | None:
        """As `VllmControl.ready`."""
        return steps.ready(await self._workers("weft_state"))

    async def refit(
        self, version: int | None = None, *, mode: str = "abort", deadlines: Deadlines | None = None
    ) -> ReplicaReport:
        """As `VllmControl.refit`; every call of the engine ends by `deadlines`."""
        self._mode = mode
        report: ReplicaReport = await self._perform(steps.refit(self._gate, version, mode, deadlines or Deadlines()))
        return report

    async def _perform(self, calls: Calls) -> Any:
        try:
            call = next(calls)
            while True:
                try:
                    answer = await self._answer(call)
                except BaseException as error:  # noqa: BLE001 - the steps decide what it means, and raise it
                    call = calls.throw(error)
                else:
                    call = calls.send(answer)
        except StopIteration as end:
            return end.value
        finally:
            calls.close()  # so that the steps see an interruption that came between two calls, too

    async def _answer(self, call: Call) -> Any:
        if call.name == "pause":
            await asyncio.sleep(call.arguments["seconds"])
            return None
        try:
            return await asyncio.wait_for(self._asked(call), call.seconds)
        except TimeoutError:
            raise DeadlineError(f"{call.name} of the engine", call.seconds, ["the engine"]) from None

    async def _asked(self, call: Call) -> Any:
        given = call.arguments
        match call.name:
            case "collective_rpc":
                return await self._workers(given["method"], given.get("args", ()))
            case "start_weight_update" | "finish_weight_update":
                return await self._workers(call.name)
            case "update_weights":
                return await self._workers(call.name, (given["request"].update_info,))
            case "reset_prefix_cache":
                return all(await self._every_engine(self._engine, call.name, given["reset_running_requests"], False))
            case _:
                return await getattr(self._engine, call.name)(**given)

    async def _workers(self, method: str, arguments: tuple[Any, ...] = ()) -> list[Any]:
        """Every worker's answer, engine by engine."""
        answers = await self._every_engine(self._engine, "collective_rpc", method, None, arguments, None)
        return [answer for workers in answers for answer in workers]


def control(llm: Any) -> VllmControl:
    """The replica control of a `vllm.LLM` made with `weight_transfer_config={"backend": "weft"}`; one per engine.

    Raises `ConfigError` for an engine with another backend.
    """
    _check_backend(llm.llm_engine.vllm_config)
    return VllmControl(llm)


def async_control(engine: Any) -> AsyncVllmControl:
    """The replica control of an `AsyncLLM` made with `weight_transfer_config={"backend": "weft"}`; one per engine.

    Raises `ConfigError` for an engine with another backend.
    """
    _check_backend(engine.vllm_config)
    compat = importlib.import_module("weft_vllm.compat")
    return AsyncVllmControl(engine, compat.every_engine)


def _check_backend(config: Any) -> None:
    transfer = config.weight_transfer_config
    backend = None if transfer is None else transfer.backend
    if backend != "weft":
        raise ConfigError(
            f"this engine's weight-transfer backend is {backend!r}: make it with "
            'weight_transfer_config={"backend": "weft"}'
        )
