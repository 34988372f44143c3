"""One process of a benchmark: a member with plain memory, refitted again and again."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

import msgspec
import torch

from weft.contracts import Adapter
from weft.deadline import Deadline, Deadlines
from weft.plugins import load
from weft.policy import Policy
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft.stores import open_store
from weft.testing.members import MemorySource, MemoryTarget
from weft_cli.bench import pattern, raw_nixl
from weft_cli.bench.settings import Case, MemberResult


def run_member(role: str, rank: int, url: str, encoded: bytes, results: Connection) -> None:
    """Take part with rank `rank` of one side; sends an encoded `MemberResult` when done."""
    os.dup2(2, 1)  # NIXL says hello on the standard output, which is for figures
    torch.set_num_threads(1)
    case = msgspec.msgpack.decode(encoded, type=Case)
    framework, parallel = case.source if role == "source" else case.target
    adapter: Adapter = load("weft.adapters", framework)
    layout = adapter.layouts(case.config, parallel, case.dtype)[rank]
    sources, _ = _world(case)
    replica_size, replicas = _replicas(case)
    name = f"{role}/{rank}"
    source = target = None
    if role == "source":
        source = MemorySource(name, layout)
        pattern.fill(layout, source.memory(), 1)
        memory = source.memory()
    else:
        target = MemoryTarget(name, layout)
        memory = target.memory()
    begin = time.perf_counter()
    refit = Refit(
        source=source,
        target=target,
        transport=case.transport,
        transport_options=case.transport_options,
        store=url,
        job="bench",
        name=name,
        replica=f"replica{rank // replica_size}" if target else None,
        replica_size=replica_size,
        expect=Expect(sources=sources, replicas=replicas),
        deadlines=Deadlines(**dict.fromkeys(("rendezvous", "offer", "begin", "move", "vote", "commit"), case.seconds)),
        policy=Policy(digests=case.digests),
    )
    with refit:
        open_seconds = time.perf_counter() - begin
        reports: list[Report] = [refit.run(version) for version in range(1, case.cycles + 1)]
    wrong = pattern.wrong_bytes(layout, memory, 1) if target else 0
    raw: dict[int, list[float]] = {}
    raw_bytes = 0
    if case.transport == "nixl":
        raw_bytes, raw = _raw(case, role, rank, url, next(iter(memory.values())))
    result = MemberResult(
        name=name,
        bytes=reports[-1].bytes,
        total_seconds=[report.seconds["total"] for report in reports],
        phases=[report.seconds for report in reports],
        raw_seconds=raw,
        raw_bytes=raw_bytes,
        registrations=[report.registrations for report in reports],
        allocations=[report.allocations for report in reports],
        store_operations=[report.store_operations for report in reports],
        open_seconds=open_seconds,
        wrong_bytes=wrong,
    )
    results.send_bytes(msgspec.msgpack.encode(result))


def _raw(case: Case, role: str, rank: int, url: str, buffer: torch.Tensor) -> tuple[int, dict[int, list[float]]]:
    """Bare writes between as many pairs as the smaller side has ranks, each with its share of the refit's bytes."""
    sources, targets = _world(case)
    pairs = min(sources, targets)
    if rank >= pairs:
        return 0, {}
    deadline = Deadline.after(case.seconds)
    storage = buffer.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
    store = open_store(url, deadline)
    store.set(f"raw/bytes/{role}/{rank}", str(memory.numel()).encode())
    sizes = [int(raw_nixl.wait_for(store, f"raw/bytes/{side}/{rank}", deadline)) for side in ("source", "target")]
    memory = memory[: min(sizes)]
    if role == "source":
        return memory.numel(), raw_nixl.send(store, rank, 2 * pairs, memory, deadline)
    raw_nixl.receive(store, rank, 2 * pairs, memory, deadline)
    return memory.numel(), {}


def _world(case: Case) -> tuple[int, int]:
    sizes = [
        load("weft.adapters", framework).world_size(parallel) for framework, parallel in (case.source, case.target)
    ]
    return sizes[0], sizes[1]


def _replicas(case: Case) -> tuple[int, int]:
    framework, parallel = case.target
    adapter: Adapter = load("weft.adapters", framework)
    replicas = adapter.replicas(parallel)
    return adapter.world_size(parallel) // replicas, replicas
