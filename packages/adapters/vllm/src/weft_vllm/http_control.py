"""The replica control of a server (`vllm serve`) in another process: pause, caches, resume, refusal, whole refits.

The routes are those of `vllm/entrypoints/rl/online/api_router.py` and `vllm/entrypoints/serve/dev` of vLLM 0.32, which
a server has in development mode; what is used here is the same in 0.31.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Mapping, Sequence
from types import NoneType, SimpleNamespace
from typing import Any

import msgspec

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, NotSupportedError, PeerLostError, PluginError
from weft.verification import Verification
from weft_vllm import limits, series, steps
from weft_vllm.server import Answer, ServerError, VllmServer
from weft_vllm.steps import Call, Calls, Gate, ReplicaReport
from weft_vllm.verification import verify_engine

_LOG = logging.getLogger("weft_vllm")
_PAUSE_SECONDS = 3600.0
"""For a pause whose caller names no deadline."""
_LOOK_SECONDS = 0.1
"""Between questions whether workers have fetched a version; each is a line in the server's log."""


class HttpControl:
    """Implements `weft.contracts.ReplicaControl` for a vLLM server, over HTTP; needs no vLLM where it runs.

    The server is started with `VLLM_SERVER_DEV_MODE=1` in its environment and
    `--weight-transfer-config '{"backend": "weft"}'`. Before anything is asked of it, and again once it was lost, the
    control looks: that it is a vLLM of a known series, that its workers have weft, whether it is paused. One that is
    found paused, or with weights that may be mixed, is refusing until a whole version is in: whoever controlled it
    before may have ended in the middle of something.

    A server cannot be told to turn requests away: while it is paused or refusing it takes them, and they wait. Nothing
    is sent twice: what a lost connection leaves undone is for the caller to ask again. One control per server, for one
    thread.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, seconds: float = 60.0, tls: ssl.SSLContext | None = None
    ) -> None:
        """`url` as in `http://HOST:PORT`, with a path if the server has one. `api_key` goes with every request, and
        into no message. `seconds` is for answers that wait for nobody; `tls` is for `https`, where the system's
        certificates do not do. Raises `ConfigError` for these; the server is asked when it is first needed.
        """
        self._server = VllmServer(url, api_key, tls)
        self._seconds = seconds
        self._gate = Gate()
        self._mode = "keep"  # of a pause that is not this control's: then requests may have been kept
        self._met = self._left = False

    def __repr__(self) -> str:
        return f"HttpControl({self.url!r})"

    @property
    def url(self) -> str:
        """The server's."""
        return self._server.url

    @property
    def refusing(self) -> str | None:
        """Why nothing is scheduled, as far as this control knows, or None when requests are served."""
        return self._gate.refused or self._gate.paused

    def join(self, **init_info: Any) -> None:
        """Make the server's workers members of a job: `store`, `job`, `replica` and the other fields of
        `weft_vllm.engine.WeftInitInfo`. Returns when everybody is there; meanwhile the server serves nobody.

        Raises `ServerError` with the workers' words.
        """
        try:
            limit = limits.connected(Deadlines(**init_info.get("deadlines", {})))
        except TypeError as error:
            raise ConfigError(f"deadlines of init_info: {error}") from error
        self._meet()
        self._post("/init_weight_transfer_engine", NoneType, limit, {"init_info": init_info})

    def pause(self, mode: str = "abort", deadline: Deadline | None = None) -> None:
        """Stop scheduling. Requests that run end as aborted (`abort`), are finished first (`wait`), or go on after
        `resume` (`keep`); those that come meanwhile wait.

        Raises `DeadlineError`, and schedules again, when that takes longer than `deadline` allows.
        """
        deadline = Deadline.after(_PAUSE_SECONDS) if deadline is None else deadline
        self._meet(deadline)
        self._mode = mode
        self._perform(steps.pause(self._gate, mode, deadline.remaining()))

    def invalidate_caches(self, version: int) -> None:
        """Forget the prefix cache and the encoder cache, and what requests that were kept have computed. Raises
        `RefusedError` when vLLM could not.
        """
        self._perform(steps.forget_caches(version, self._mode))

    def resume(self, version: int) -> None:
        """Schedule again. Raises `RefusedError` where the control refuses and not all workers have `version` whole: the
        server then stays as it is, until a whole version is in (`refit`).
        """
        self._perform(steps.resume(self._gate, version))

    def refuse(self, reason: str) -> None:
        """Pause until a whole version is in. Requests that run end as aborted; those that come wait. A control that
        finds the server so does not know the reason, and goes on refusing.
        """
        self._meet()
        self._gate.refuse(reason)
        self._answer(Call("sleep", {"mode": "abort"}, self._seconds))

    def ready(self) -> int | None:
        """As `VllmControl.ready`."""
        self._meet()
        return steps.ready(self._workers("weft_state", (), self._seconds))

    def refit(
        self, version: int | None = None, *, mode: str = "abort", deadlines: Deadlines | None = None
    ) -> ReplicaReport:
        """As `VllmControl.refit`; every request ends by `deadlines`. While workers wait for others the server answers
        nobody, `/is_paused` included. What an earlier control has begun and left is given up first.
        """
        self._meet()
        if self._left:
            self._workers("weft_abort", ("whoever began this update has left it",), self._seconds)
            self._left = False
        self._mode = mode
        report: ReplicaReport = self._perform(steps.refit(self._gate, version, mode, deadlines or Deadlines()))
        return report

    def verify(
        self, path: str, *, casts: Sequence[tuple[str, str]] = (), ignore: Sequence[str] = (), seconds: float = 600.0
    ) -> Verification:
        """As `VllmControl.verify`, within `seconds`; the server's workers and this process see `path`."""
        self._meet()
        asked = SimpleNamespace(collective_rpc=lambda method, args: self._workers(method, args, seconds))
        return verify_engine(asked, path, casts=casts, ignore=ignore)

    def _meet(self, deadline: Deadline | None = None) -> None:
        """Look at the server, unless that has been done since it was last lost; within `seconds`, or by `deadline`.

        Raises what `VllmServer.ask` does, `PluginError` for another series, `ConfigError` where workers have no weft,
        `NotSupportedError` for several data-parallel engines.
        """
        if self._met:
            return
        limit = Deadline.after(self._seconds) if deadline is None else deadline.earlier(self._seconds)
        version = self._get("/version", _Version, limit).version
        try:
            support = series.check(version)
        except PluginError as error:
            raise PluginError(f"the server at {self.url}: {error}") from None
        paused = self._get("/is_paused", _IsPaused, limit).is_paused
        engines = self._get("/get_world_size", _WorldSize, limit).world_size
        one = self._get("/get_world_size", _WorldSize, limit, include_dp="false").world_size
        if engines != one:
            raise NotSupportedError(
                f"the server at {self.url} has several data-parallel engines ({engines} workers, {one} in each), and "
                "answers for the first one alone: start a server for each engine, or drive an AsyncLLM"
            )
        try:
            states = msgspec.convert(self._workers("weft_state", (), limit.remaining()), list[_State])
        except (ServerError, msgspec.ValidationError) as error:
            raise ConfigError(
                f"the workers of the server at {self.url} do not know weft: install weft-vllm where it runs, and start "
                f'it with --weight-transfer-config \'{{"backend": "weft"}}\' ({error})'
            ) from error
        if not support.tested:
            _LOG.warning("%s: vLLM %s: weft-vllm is tested with %s only", self.url, version, series.TESTED_SERIES)
        self._gate.paused = None
        self._left = paused or any(state.touched for state in states)
        if not self._left:
            self._gate.refused = None
        elif self._gate.refused is None:
            self._gate.refuse("it was found paused, or with weights that may be mixed, and nobody has said why")
        self._met = True

    def _perform(self, calls: Calls) -> Any:
        self._meet()
        return steps.perform(calls, self._answer)

    def _answer(self, call: Call) -> Any:
        given = call.arguments
        match call.name:
            case "pause":
                time.sleep(max(given["seconds"], _LOOK_SECONDS))
                return None
            case "sleep":
                return self._pause(given["mode"], call.seconds)
            case "wake_up":
                return self._post("/resume", NoneType, call.seconds)
            case "collective_rpc":
                return self._workers(given["method"], given.get("args", ()), call.seconds)
            case "update_weights":
                return self._post(
                    "/update_weights", NoneType, call.seconds, {"update_info": given["request"].update_info}
                )
            case "reset_prefix_cache":
                running = str(given["reset_running_requests"]).lower()
                query = {"reset_running_requests": running}
                return self._post("/reset_prefix_cache", _Success, call.seconds, query=query).success
            case _:  # start_weight_update, finish_weight_update, update_weight_version, reset_encoder_cache
                return self._post(f"/{call.name}", NoneType, call.seconds, given or None)

    def _pause(self, mode: str, seconds: float) -> None:
        try:
            self._post("/pause", NoneType, seconds, query={"mode": mode, "clear_cache": "false"})
        except DeadlineError as error:
            why = ": it finishes the requests that run, which the modes abort and keep do not" if mode == "wait" else ""
            raise DeadlineError(error.what, error.seconds, [f"{late}{why}" for late in error.late]) from None

    def _workers(self, method: str, arguments: Sequence[Any], seconds: float) -> list[Any]:
        """What each worker answers, in rank order."""
        asked = {"method": method, "args": list(arguments)}
        return self._post("/collective_rpc", _Results, seconds, asked).results

    def _get(self, route: str, kind: type[Answer], limit: Deadline, **query: str) -> Answer:
        return self._ask("GET", route, kind, limit.remaining(), query=query)

    def _post(
        self, route: str, kind: type[Answer], seconds: float, body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Answer:  # fmt: skip
        return self._ask("POST", route, kind, seconds, body=body, query=query)

    def _ask(self, verb: str, route: str, kind: type[Answer], seconds: float, **more: Any) -> Answer:
        try:
            return self._server.ask(verb, route, kind, seconds, **more)
        except PeerLostError:
            self._met = False  # what comes back may be another one
            raise


class _Version(msgspec.Struct):
    version: str


class _IsPaused(msgspec.Struct):
    is_paused: bool


class _WorldSize(msgspec.Struct):
    world_size: int


class _Success(msgspec.Struct):
    success: bool


class _Results(msgspec.Struct):
    results: list[Any]


class _State(msgspec.Struct):
    """A worker's `weft_state`."""

    touched: bool
    watched: dict[str, Any] | None
