"""Processes that control a vLLM server over HTTP until they are killed; each begins when it is told to."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection
from typing import Any

from weft.orchestration import Orchestrator
from weft_vllm import HttpControl


def orchestrate(pipe: Connection, url: str, store: str, job: str, replica: str) -> None:
    """An orchestrator of one replica."""
    pipe.send("ready")
    pipe.recv()
    with Orchestrator(store=store, job=job, controls={replica: HttpControl(url)}, lease_seconds=120.0) as orchestrator:
        pipe.send("open")
        orchestrator.serve()


def halfway(pipe: Connection, url: str, version: int) -> None:
    """A control that comes as far into a refit, with requests kept, as to let the sources write."""

    class Halting(HttpControl):
        def _answer(self, call: Any) -> Any:
            answer = super()._answer(call)
            if call.name == "start_weight_update":
                pipe.send("begun")
                threading.Event().wait()
            return answer

    pipe.send("ready")
    pipe.recv()
    Halting(url).refit(version, mode="keep")
