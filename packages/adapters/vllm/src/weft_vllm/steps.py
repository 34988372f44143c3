"""A refit of one vLLM engine as a sequence of calls, which an offline and an asynchronous engine answer alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.deadline import Deadline, Deadlines
from weft.errors import DeadlineError, RefitAbortedError, WeftError
from weft_vllm import limits

_POLL_SECONDS = 10e-3
"""Between questions whether workers have fetched a version."""


class RefusedError(WeftError):
    """The engine does not take requests: it is paused, or its weights may be a mixture of two versions."""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One refit of one engine."""

    version: int
    digest: str
    """Of the whole version, in hex; equal on all workers and all replicas."""
    nbytes: int
    """Bytes written, over all workers."""
    pause_seconds: float
    """From the first moment without scheduling to the last."""
    seconds: Mapping[str, float]
    """Per phase, of the worker that took longest over it."""
    workers: Sequence[Mapping[str, Any]]
    """Every worker's own report, in rank order."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the engine, by the name that `LLM` and `AsyncLLM` share; `pause` is none of theirs."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    """How long it may take, where the engine's call can be given up (`weft_vllm.limits`)."""


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """What `update_weights` takes, as vLLM's own request has it."""

    update_info: dict[str, Any]


Calls = Generator[Call, Any, Any]


def perform(calls: Calls, answer: Callable[[Call], Any]) -> Any:
    """Have every call answered, and give what they come to. An error of a call goes to the steps, which decide what it
    means, and raise it.
    """
    try:
        call = next(calls)
        while True:
            try:
                given = answer(call)
            except BaseException as error:  # noqa: BLE001 - see above
                call = calls.throw(error)
            else:
                call = calls.send(given)
    except StopIteration as end:
        return end.value
    finally:
        calls.close()  # so that the steps see an interruption that came between two calls, too


@dataclass
class Gate:
    """Whether the engine takes requests, and why it does not."""

    paused: str | None = None
    refused: str | None = None

    def refuse(self, reason: str) -> None:
        """Until a whole version is in."""
        self.refused = reason


def ready(workers: Sequence[Mapping[str, Any]]) -> int | None:
    """The version that all workers have fetched and voted for, from their `weft_state`; None as long as there is none.

    Raises `RefitAbortedError` with the reasons of workers where fetching has failed.
    """
    watched = [worker["watched"] for worker in workers if worker["watched"] is not None]
    failed = [f"worker {rank}: {state['error']}" for rank, state in enumerate(watched) if state["error"] is not None]
    if failed:
        raise RefitAbortedError(next(state["version"] or -1 for state in watched if state["error"] is not None), failed)
    versions = {state["version"] if state["stage"] == "ready" else None for state in watched}
    return versions.pop() if len(versions) == 1 else None


def refit(gate: Gate, version: int | None, mode: str, deadlines: Deadlines) -> Calls:
    """Install the version that the sources offer: fetch (workers that watch do it while they serve), pause, update,
    commit, forget caches, resume. Returns a `ReplicaReport`.

    Whatever ends it once workers may have begun, an interruption too, the gate refuses, unless they say that nothing
    that is served has changed.
    """
    yield from _fetched(Deadline.after(limits.fetched(deadlines)))
    started = time.perf_counter()
    yield from pause(gate, mode, deadlines.begin)
    committing = False
    try:
        yield Call("start_weight_update", seconds=limits.begun(deadlines))
        request = UpdateRequest({"version": version})
        yield Call("update_weights", {"request": request}, limits.updated(deadlines))
        committing = True
        yield Call("finish_weight_update", seconds=limits.committed(deadlines))
        workers = yield Call("collective_rpc", {"method": "weft_report"})
        installed = _one_version(workers)
        yield Call("update_weight_version", {"new_version": str(installed)})
        yield from forget_caches(installed, mode)
    except Exception as error:
        yield from _fail(gate, f"{type(error).__name__}: {error}", committing)
        raise
    except BaseException as error:  # an interruption: nobody can be asked, and the next refit gives this one up
        _doubt(gate, f"{type(error).__name__}: {error}")
        raise
    gate.refused = None
    yield from _open(gate)
    return _summary(workers, installed, time.perf_counter() - started)


def pause(gate: Gate, mode: str, seconds: float) -> Calls:
    """Stop scheduling. Raises `DeadlineError` when that took longer, and schedules again."""
    deadline = Deadline.after(seconds)
    gate.paused = "it is paused for a refit; refit() or resume() opens it again"
    try:
        yield Call("sleep", {"level": 0, "mode": mode}, seconds)
        if deadline.expired():
            raise DeadlineError("pausing the engine", seconds, ["the scheduler"])
    except Exception as error:
        if isinstance(error, DeadlineError):
            yield from _open(gate)
        gate.paused = None
        raise


def forget_caches(version: int, mode: str) -> Calls:
    """Forget the prefix cache and the encoder cache. Raises `RefusedError` when vLLM could not."""
    if not (yield Call("reset_prefix_cache", {"reset_running_requests": mode == "keep"})):
        raise RefusedError(
            f"the prefix cache could not be reset for version {version}: requests still hold blocks of it; "
            'pause with mode "abort" or "keep"'
        )
    yield Call("reset_encoder_cache")


def resume(gate: Gate, version: int) -> Calls:
    """Schedule again. Where the gate refuses, only if all workers have `version` whole, and once what was computed with
    other weights is forgotten; else raises `RefusedError`: requests that were kept stay where they are.
    """
    if gate.refused is not None:
        reports = yield Call("collective_rpc", {"method": "weft_report"})
        states = yield Call("collective_rpc", {"method": "weft_state"})
        if any(state["touched"] for state in states) or {report["version"] for report in reports} != {version}:
            raise RefusedError(f"version {version} is not whole, nothing is scheduled until one is: {gate.refused}")
        yield from forget_caches(version, "keep")
        gate.refused = None
    yield from _open(gate)


def _open(gate: Gate) -> Calls:
    """Schedule again, unless the gate refuses: a mixture must not be served to what was kept either."""
    if gate.refused is None:
        yield Call("wake_up", {"tags": ["scheduling"]})
    gate.paused = None


def _fetched(deadline: Deadline) -> Calls:
    """Wait until all workers have fetched one version, if they watch. Raises `RefitAbortedError` when fetching has
    failed: nothing has been paused for it.
    """
    while True:
        workers = yield Call("collective_rpc", {"method": "weft_state"})
        watched = [worker["watched"] for worker in workers if worker["watched"] is not None]
        if not watched:
            return
        try:
            if ready(workers) is not None:
                return
        except RefitAbortedError as error:
            busy = [s for s in watched if s["version"] == error.version and s["stage"] in ("fetching", "ready")]
            if not busy:  # else the others are about to hear of it
                yield Call("collective_rpc", {"method": "weft_abort", "args": (str(error),)})
                raise
        if deadline.expired():
            late = [f"worker {rank}: {state['stage']}" for rank, state in enumerate(watched)]
            raise DeadlineError("a version in shadow memory", deadline.seconds, late)
        yield Call("pause", {"seconds": _POLL_SECONDS})


def _doubt(gate: Gate, reason: str) -> None:
    gate.refuse(f"the last refit failed, and its weights may be mixed with older ones: {reason}")


def _fail(gate: Gate, reason: str, committing: bool) -> Calls:
    """Give the update up. If what is served may be a mixture, nothing is scheduled until a whole version is in."""
    before = gate.refused
    _doubt(gate, reason)
    try:
        yield Call("collective_rpc", {"method": "weft_abort", "args": (reason,)})
        if not committing:
            workers = yield Call("collective_rpc", {"method": "weft_state"})
            if not any(worker["touched"] for worker in workers):
                gate.refused = before
        if gate.refused is None:
            yield from _open(gate)
        else:
            yield Call("sleep", {"level": 0, "mode": "abort"})
    except Exception as error:  # noqa: BLE001 - the first error is the one to raise; the engine may be gone altogether
        gate.refuse(f"{reason}; giving the refit up failed as well: {error}")


def _one_version(workers: Sequence[Mapping[str, Any]]) -> int:
    """The version that every worker has. Raises `RefitAbortedError` when they differ (traps 46 and 58)."""
    versions = [worker["version"] for worker in workers]
    if len(set(versions)) != 1 or versions[0] is None:
        raise RefitAbortedError(
            -1, [f"worker {rank} serves version {version}" for rank, version in enumerate(versions)]
        )
    return int(versions[0])


def _summary(workers: Sequence[Mapping[str, Any]], version: int, pause_seconds: float) -> ReplicaReport:
    refits = [worker["refit"] for worker in workers]
    phases = {phase for refit in refits for phase in refit["seconds"]}
    return ReplicaReport(
        version=version,
        digest=refits[0]["digest"],
        nbytes=sum(refit["bytes"] for refit in refits),
        pause_seconds=pause_seconds,
        seconds={phase: max(refit["seconds"].get(phase, 0.0) for refit in refits) for phase in sorted(phases)},
        workers=workers,
    )
