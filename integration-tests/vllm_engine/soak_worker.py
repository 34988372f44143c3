"""What `soak_case.py` calls in its engine's worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from soak_trainer import Job

from weft.testing.faults import install
from weft_vllm.engine import WeftInitInfo


def join(worker: Any, fields: dict[str, Any]) -> None:
    """In the engine's worker: join the `Job` with these fields, with faults of its own."""
    job = Job(**fields)
    if not hasattr(worker, "soak_faults"):
        worker.soak_faults, worker.soak_plugins = job.faults(), TemporaryDirectory()
        install(Path(worker.soak_plugins.name))
        sys.path.insert(0, worker.soak_plugins.name)
    members = {} if job.drive == "published" else {"sources": 1, "replicas": 1}
    policy = {**job.policy, "drive": "published"} if job.drive == "published" else job.policy
    worker.weight_transfer_engine.init_transfer_engine(
        WeftInitInfo(
            store=job.store, job="soak", replica="rollout0", transport="faulty", deadlines=job.deadlines,
            transport_options=job.options(worker.soak_faults), policy=policy, **members,
        )
    )  # fmt: skip


def strike(worker: Any, what: str, seed: int, seconds: float) -> None:
    """In the engine's worker."""
    worker.soak_faults.do(what, seed, seconds)


def calm(worker: Any) -> None:
    """In the engine's worker: no more faults."""
    worker.soak_faults.calm()


def flips(worker: Any) -> int:
    """In the engine's worker: of how many versions a byte was changed on its way since the last call."""
    flipped = worker.soak_faults.flipped
    count = len(flipped)
    flipped.clear()
    return count


def processes(worker: Any) -> tuple[int, int]:
    """In the engine's worker: the engine's core, and itself."""
    return os.getppid(), os.getpid()
