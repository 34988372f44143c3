"""Replica control of an offline vLLM engine: pause, caches, resume, refusal, and a whole refit in one call."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, RefitAbortedError, WeftError
from weft.verification import Verification
from weft_vllm.verification import verify_engine

_log = logging.getLogger("weft_vllm")


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


class VllmControl:
    """Implements `weft.contracts.ReplicaControl` for a `vllm.LLM`. For the thread that owns the `LLM`.

    While the engine is paused or refusing, `generate`, `chat` and every other way of adding requests raise
    `RefusedError`; vLLM itself would queue them for ever.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._accept = llm.llm_engine.add_request
        self._mode = "abort"
        self._closed: str | None = None
        self._refused: str | None = None
        llm.llm_engine.add_request = self._add_request

    @property
    def refusing(self) -> str | None:
        """Why the engine takes no requests, or None when it does."""
        return self._refused or self._closed

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
        self._closed = "it is paused for a refit; refit() or resume() opens it again"
        try:
            self._llm.sleep(level=0, mode=mode)
        except Exception:
            self._closed = None
            raise
        if deadline is not None and deadline.expired():
            self.resume(-1)
            raise DeadlineError("pausing the engine", deadline.seconds, ["the scheduler"])

    def invalidate_caches(self, version: int) -> None:
        """Forget the prefix cache and the encoder cache. Raises `RefusedError` when vLLM could not: blocks are still in
        use.
        """
        if not self._llm.reset_prefix_cache(reset_running_requests=self._mode == "keep"):
            raise RefusedError(
                f"the prefix cache could not be reset for version {version}: requests still hold blocks of it; "
                'pause with mode "abort" or "keep"'
            )
        self._llm.llm_engine.reset_encoder_cache()

    def resume(self, version: int) -> None:
        """Schedule again. An engine that refuses keeps refusing until a whole version is in (`refit`)."""
        self._llm.wake_up(tags=["scheduling"])
        self._closed = None

    def refuse(self, reason: str) -> None:
        """Take no requests until a whole version is in; they raise `RefusedError` with the reason."""
        self._refused = reason

    def refit(
        self, version: int | None = None, *, mode: str = "abort", deadlines: Deadlines | None = None
    ) -> ReplicaReport:
        """Install the version that the sources offer: pause, begin, update, commit, forget caches, resume.

        `version`, when given, must be the offered one. A failure is raised again. When nothing had been written (no
        offer in time, say) the engine goes on serving what it served; else it refuses until a later refit succeeds.
        """
        started = time.perf_counter()
        self.pause(mode, Deadline.after((deadlines or Deadlines()).begin))
        writable = False
        try:
            self._llm.start_weight_update()
            writable = True
            self._llm.update_weights({"update_info": {"version": version}})
            self._llm.finish_weight_update()
            workers = self._llm.collective_rpc("weft_report")
            installed = _one_version(workers)
            self._llm.update_weight_version(str(installed))
            self.invalidate_caches(installed)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}", writable)
            raise
        self._refused = None
        self.resume(installed)
        return _summary(workers, installed, time.perf_counter() - started)

    def verify(self, path: str, *, casts: Sequence[tuple[str, str]] = (), ignore: Sequence[str] = ()) -> Verification:
        """What all workers hold against the safetensors checkpoint at `path`: `failures()` of the result is empty when
        every tensor is equal. Between refits; only reads. Arguments and errors as for `verify_engine`.
        """
        return verify_engine(self._llm, path, casts=casts, ignore=ignore)

    def _fail(self, reason: str, writable: bool) -> None:
        if writable:
            self.refuse(f"the last refit failed, and its weights may be mixed with older ones: {reason}")
        try:
            self._llm.collective_rpc("weft_abort", args=(reason,))
            self.resume(-1)
        except Exception as error:  # noqa: BLE001 - the first error is the one to raise; the engine may be gone altogether
            self.refuse(f"{reason}; giving the refit up failed as well: {error}")
            _log.exception("giving a failed refit up")


def control(llm: Any) -> VllmControl:
    """The replica control of a `vllm.LLM` made with `weight_transfer_config={"backend": "weft"}`; one per engine.

    Raises `ConfigError` for an engine with another backend.
    """
    transfer = llm.llm_engine.vllm_config.weight_transfer_config
    backend = None if transfer is None else transfer.backend
    if backend != "weft":
        raise ConfigError(
            f"this engine's weight-transfer backend is {backend!r}: make it with "
            'LLM(..., weight_transfer_config={"backend": "weft"})'
        )
    return VllmControl(llm)


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
