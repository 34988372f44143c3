"""Members of a refit job in processes of their own, which tests can kill and freeze."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from weft.builder import LayoutBuilder
from weft.deadline import Deadlines
from weft.errors import WeftError
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

TINY = Tiny()
LARGE = Tiny(layers=24, hidden=512, inner=1024)
"""Enough bytes that something can happen while they move."""
_COUNTED = 100
"""Versions between two counts of what the process holds."""


@dataclass(frozen=True, slots=True)
class Role:
    """What one process is and does. Everything that crosses to it is plain data."""

    name: str
    store: str
    job: str
    transport: str
    sources: int = 2
    targets: int = 2
    limits: float = 6.0
    """Seconds of every deadline but the rendezvous."""
    rendezvous: float = 60.0
    large: bool = False
    versions: int = 2
    said: int = 2
    """Versions that are reported one by one: nobody empties a pipe that fills meanwhile."""
    relay: bool = False
    """Every target wants the whole model, on another host than the trainers', and they pass it on to each other."""
    chain: bool = False
    """Every target is a replica of its own, on a host of its own: they pass the whole model on, one to the next."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the transport."""
    host: str | None = None
    again: bool = False
    """After an error it closes, and when it is told to, opens the job anew and goes on with the next version."""
    fault: str = ""
    """What is wrong with its layout: `extra`, `missing`, `shape` or `dtype`."""
    freeze: str = ""
    """Before this ("join", "hold", "begin", "land") it says so and waits, the first time that it does so in a version
    from `freeze_version` on.
    """
    freeze_version: int = 0
    freeze_seconds: float = 600.0


def act(role: Role, pipe: Connection) -> None:
    """One process: joins, refits, and sends ("report", …) or ("error", type, text) for the first versions and whatever
    is wrong later, and ("resources", version, registrations and allocations, store operations, bytes, descriptors).
    """
    torch.set_num_threads(1)
    tiny = LARGE if role.large else TINY

    done: set[str] = set()
    version = 0

    def before(what: str, argument: object) -> None:
        if what == role.freeze and what not in done and version >= role.freeze_version:
            pipe.send(("frozen", what))
            time.sleep(role.freeze_seconds)
        if version >= role.freeze_version:
            done.add(what)

    rank = int(role.name[-1])
    share = (0, 1) if role.relay or role.chain else (rank, role.targets)
    source = target = None
    if role.name.startswith("trainer"):
        source = MemorySource(
            role.name, _faulty(tiny, role) if role.fault else tiny.source(rank, role.sources), before=before
        )
    else:
        target = MemoryTarget(role.name, tiny.target(*share), before=before)
    while True:
        refit = _refit(role, source, target)
        failed = False
        try:
            before("join", None)
            refit.open()
            pipe.send(("joined",))
            while version < role.versions:
                version += 1
                if source is not None:
                    source.load(tiny.tensors(version))
                if target is not None:
                    target.poison()
                if version <= role.said:
                    pipe.send(("started", version))
                report = refit.run(version)
                wrong = mismatches(target.contents(), tiny.expected(*share, tiny.tensors(version))) if target else []
                if wrong or version <= role.said:
                    figures = (report.bytes, report.relayed_bytes, report.buckets)
                    pipe.send(("report", version, report.digest, wrong, *figures))
                if not version % _COUNTED:
                    made = report.registrations + report.allocations
                    pipe.send(("resources", version, made, report.store_operations, *_resources()))
        except WeftError as error:
            failed = True
            safe = target is None or "begin" not in done or bool(target.refused)
            pipe.send(("error", type(error).__name__, str(error), safe, -1 if target is None else target.version))
        refit.close()
        if not (failed and role.again):
            break
        pipe.recv()
    pipe.send(("closed",))


def _refit(role: Role, source: MemorySource | None, target: MemoryTarget | None) -> Refit:
    limits = role.limits
    deadlines = Deadlines(
        rendezvous=role.rendezvous, offer=limits, begin=limits, move=limits, vote=limits, commit=limits
    )
    host = ("trainers" if source else "engines") if role.relay else None
    replica, replicas, size = "rollout0", 1, role.targets
    if role.chain:
        replica, replicas, size = f"rollout{role.name[-1]}", role.targets, 1
        host = "trainers" if source else replica
    return Refit(
        source=source, target=target, transport=role.transport, transport_options=role.options, store=role.store,
        job=role.job, name=role.name, replica=None if source else replica, replica_size=size,
        expect=Expect(role.sources, replicas), deadlines=deadlines, host=role.host or host,
        policy=Policy(bucket_bytes=1 << 18, staging_bytes=1 << 22, relay="host" if role.relay else "never",
                      chain="always" if role.chain else "never"),
    )  # fmt: skip


def _resources() -> tuple[int, int]:
    """(resident bytes, open file descriptors) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def _faulty(tiny: Tiny, role: Role) -> Any:
    """A source's layout that does not fit its targets'."""
    builder, whole = LayoutBuilder(), tiny.source(int(role.name[-1]), 1)
    for tensor in whole.tensors:
        if role.fault == "missing" and tensor.name == "1.norm":
            continue
        wrong = tensor.name == "1.norm"
        shape = (tiny.hidden + 1,) if wrong and role.fault == "shape" else tensor.shape
        dtype = "float32" if wrong and role.fault == "dtype" else tensor.dtype
        builder.tensor(tensor.name, shape, dtype)
        builder.buffer(tensor.name, dtype, torch.Size(shape).numel(), group="g")
        builder.shard(tensor.name, tensor.name)
    if role.fault == "extra":
        builder.tensor("stranger", (4,), "float32")
        builder.buffer("stranger", "float32", 4, group="g")
        builder.shard("stranger", "stranger")
    return builder.build()


class Cast:
    """The processes of one job. A context manager that leaves none behind."""

    def __init__(
        self, roles: list[Role], starting: Callable[[str], AbstractContextManager[None]] | None = None
    ) -> None:
        """`starting(name)` is entered while a process is started, from nothing. Without it processes are forks of one
        that has imported torch, which saves each of them more than a second.
        """
        context = multiprocessing.get_context("forkserver" if starting is None else "spawn")
        context.set_forkserver_preload(["weft.testing.members", "weft.testing.tiny"])
        self._pipes: dict[str, Connection] = {}
        self._processes: dict[str, Any] = {}
        self.said: dict[str, list[tuple[Any, ...]]] = {role.name: [] for role in roles}
        for role in roles:
            near, far = context.Pipe()
            self._processes[role.name] = context.Process(target=act, args=(role, far), daemon=True)
            with nullcontext() if starting is None else starting(role.name):
                self._processes[role.name].start()
            far.close()
            self._pipes[role.name] = near

    def __enter__(self) -> Cast:
        return self

    def __exit__(self, *_: object) -> None:
        for name, process in self._processes.items():
            process.kill()
            process.join(10)
            self._pipes[name].close()

    def until(self, name: str, *what: object, seconds: float = 180.0) -> None:
        """Wait for a process to say something that begins so."""
        limit = time.monotonic() + seconds
        while not any(said[: len(what)] == what for said in self.said[name]):
            assert self._pipes[name].poll(max(0.0, limit - time.monotonic())), f"{name} never said {what}: {self.said}"
            self.said[name].append(self._pipes[name].recv())

    def tell(self, name: str) -> None:
        """Let it go on: it has said what went wrong and waits to be told to open the job anew."""
        self._pipes[name].send("again")

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._processes[name].kill()
        self._processes[name].join(10)

    def freeze(self, name: str) -> None:
        """SIGSTOP."""
        os.kill(self._processes[name].pid, signal.SIGSTOP)

    def ends(self, *names: str, seconds: float = 180.0) -> dict[str, list[tuple[Any, ...]]]:
        """What these said until they closed; each process must have ended by itself with exit code 0."""
        limit = time.monotonic() + seconds
        for name in names:
            self.until(name, "closed", seconds=max(0.1, limit - time.monotonic()))
            self._processes[name].join(40)
            assert self._processes[name].exitcode == 0, f"{name} did not end: {self._processes[name].exitcode}"
        return {name: self.said[name] for name in names}

    def errors(self, *names: str, seconds: float = 180.0) -> dict[str, tuple[Any, ...]]:
        """The error of each, as ("error", type, text, whether its target is untouched or refuses, its version)."""
        said = self.ends(*names, seconds=seconds)
        errors = {name: [entry for entry in entries if entry[0] == "error"] for name, entries in said.items()}
        assert all(len(found) == 1 for found in errors.values()), said
        return {name: found[0] for name, found in errors.items()}
