"""One process of a benchmark: a member with plain memory, refitted again and again beside bare transfers."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

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
from weft_cli.bench import bare, pattern
from weft_cli.bench.isolated import forget_peak, rss_bytes
from weft_cli.bench.megatron_refit import MegatronRefit
from weft_cli.bench.settings import Case, MemberResult, Seat
from weft_cli.bench.tensor_by_tensor import TensorByTensor


def run_member(seat: bytes, url: str, encoded: bytes, results: Connection) -> None:
    """Take part in a case (an encoded `Case`) from an encoded `Seat`; sends an encoded `MemberResult` when done."""
    os.dup2(2, 1)  # NIXL says hello on the standard output, which is for figures
    torch.set_num_threads(1)
    case = msgspec.msgpack.decode(encoded, type=Case)
    os.environ.update(case.environment)
    with ExitStack() as stack:
        member = _Member(case, msgspec.msgpack.decode(seat, type=Seat), url, stack)
        for cycle in range(case.cycles):
            member.cycle(cycle)
        results.send_bytes(msgspec.msgpack.encode(member.result()))


class _Member:
    def __init__(self, case: Case, seat: Seat, url: str, stack: ExitStack) -> None:
        self._case, self._seat, self._url, self._stack = case, seat, url, stack
        self._deadline = Deadline.after(case.seconds)
        self._store = open_store(url, self._deadline)
        worlds = [_adapter(side).world_size(side[1]) for side in (case.source, case.target)]
        self._sources, self._targets = worlds
        self._members = max(worlds) if case.collocated else sum(worlds)
        self.source: MemorySource | None = None
        self.target: MemoryTarget | None = None
        if seat.source is not None:
            layout = _adapter(case.source).layouts(case.config, case.source[1], case.dtype)[seat.source]
            self.source = MemorySource(seat.name, layout)
            pattern.fill(layout, self.source.memory(), 1)
        if seat.target is not None:
            layout = _adapter(case.target).layouts(case.config, case.target[1], case.dtype)[seat.target]
            self.target = MemoryTarget(seat.name, layout)
        self._refits: dict[str, Refit] = {}
        self._pair: bare.Pair | None = None
        self._bare_bytes = 0
        self._naive: TensorByTensor | None = None
        self._reports: list[Report] = []
        self._joins: list[dict[str, float]] = []
        self._beside: list[float] = []
        self._beside_pauses: list[float] = []
        self._bare: dict[int, list[float]] = {}
        self._by_tensor: list[float] = []
        self._theirs: MegatronRefit | None = None
        self._megatron: list[float] = []
        self._extra = 0
        self._wrong = 0

    def cycle(self, cycle: int) -> None:
        """A refit with each policy, then the bare transfers: in turn, so that a machine that others use too is equally
        busy with all of them.
        """
        case, last = self._case, cycle == self._case.cycles - 1
        ways = [("weft", case.policy, case.transport_options)]
        if case.beside is not None:
            ways.append(("beside", case.beside, case.beside_options))
        for job, policy, options in ways[:: -1 if cycle % 2 else 1]:
            report, join = self._refit(job, policy, options, cycle)
            if job == "beside":
                self._beside.append(report.seconds["total"])
                self._beside_pauses += _pause(report)
            else:
                self._reports.append(report)
                self._joins.append(join)
            self._check(last)
        if case.transport in bare.MODULES and not case.collocated:
            self._bare_transfers(cycle)
        if case.tensor_by_tensor:
            self._send_by_tensor(cycle)
            self._check(last)
        if case.beside_megatron:
            self._refit_by_megatron(cycle)

    def _refit(self, job: str, policy: Policy, options: dict[str, Any], cycle: int) -> tuple[Report, dict[str, float]]:
        join: dict[str, float] = {}
        if not self._case.reuse:
            job = f"{job}/{cycle}"
        if self.target is not None:
            self.target.poison()
        self._meet(f"{job}/join/{cycle}")
        if job not in self._refits:
            self._refits[job], join = self._join(job, policy, options)
        refit = self._refits[job]
        resident, _ = rss_bytes()
        self._meet(f"{job}/refit/{cycle}")
        forget_peak()
        report = refit.run(cycle + 1)
        self._extra = max(self._extra, refit.staging_bytes + rss_bytes()[1] - resident)
        if not self._case.reuse:
            self._refits.pop(job).close()
        return report, join

    def _join(self, job: str, policy: Policy, options: dict[str, Any]) -> tuple[Refit, dict[str, float]]:
        case, begin = self._case, time.perf_counter()
        replicas = _adapter(case.target).replicas(case.target[1])
        stages = ("rendezvous", "offer", "begin", "move", "vote", "commit")
        size = self._targets // replicas
        refit = Refit(
            source=self.source,
            target=self.target,
            transport=case.transport,
            transport_options=options,
            store=self._url,
            job=job,
            name=self._seat.name,
            replica=f"replica{self._seat.target // size}" if self._seat.target is not None else None,
            replica_size=size,
            expect=Expect(sources=self._sources, replicas=replicas),
            deadlines=Deadlines(**dict.fromkeys(stages, case.seconds)),
            policy=policy,
        )
        refit.open()
        self._stack.callback(refit.close)
        known = dict(refit.join_seconds)
        return refit, {**known, "join": time.perf_counter() - begin - sum(known.values())}

    def _bare_transfers(self, cycle: int) -> None:
        """Between as many pairs as the smaller side has ranks, each with its share of the refit's bytes."""
        rank = self._seat.source if self._seat.target is None else self._seat.target
        pairs = min(self._sources, self._targets)
        sends = self._seat.target is None
        if rank is not None and rank < pairs and self._pair is None:
            self._open_pair(rank, pairs, sends=sends)
        for chunk in bare.CHUNK_BYTES:
            for warm in (False, True) if cycle == 0 else (True,):
                self._meet(f"bare/{chunk}/{cycle}/{warm}")
                if self._pair is not None:
                    begin = time.perf_counter()
                    self._pair.move(self._bare_bytes, chunk, self._deadline)
                    if warm and sends:
                        self._bare.setdefault(chunk, []).append(time.perf_counter() - begin)

    def _open_pair(self, rank: int, pairs: int, *, sends: bool) -> None:
        side = self.source if sends else self.target
        assert side is not None
        storage = next(iter(side.memory().values())).untyped_storage()
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        if not sends:
            self._store.set(f"bare/bytes/{rank}", str(self._reports[0].bytes).encode())
        wanted = sum(int(bare.wait_for(self._store, f"bare/bytes/{n}", self._deadline)) for n in range(pairs)) // pairs
        role = "source" if sends else "target"
        self._store.set(f"bare/size/{role}/{rank}", str(memory.numel()).encode())
        sizes = [self._size(other, rank) for other in ("source", "target")]
        self._bare_bytes = min(wanted, *sizes)
        key = f"bare/{rank}"
        self._pair = bare.open_pair(
            self._case.transport, self._store, key, sends=sends, memory=memory, deadline=self._deadline
        )
        self._stack.callback(self._pair.close)

    def _size(self, role: str, rank: int) -> int:
        return int(bare.wait_for(self._store, f"bare/size/{role}/{rank}", self._deadline))

    def _send_by_tensor(self, cycle: int) -> None:
        if self._naive is None:
            source, target = ((side.layout(), side.memory()) if side else None for side in (self.source, self.target))
            own = next(iter(self._refits.values())).slice
            self._naive = TensorByTensor(self._store, own, source, target, self._deadline)
            self._stack.callback(self._naive.close)
        if self.target is not None:
            self.target.poison()
        self._meet(f"by-tensor/{cycle}")
        begin = time.perf_counter()
        self._naive.run()
        self._by_tensor.append(time.perf_counter() - begin)

    def _refit_by_megatron(self, cycle: int) -> None:
        if self._theirs is None:
            self._theirs = MegatronRefit(self._case, self._seat, self._store, self._members, self._deadline)
            self._stack.callback(self._theirs.close)
        self._theirs.poison()
        self._meet(f"megatron/{cycle}")
        begin = time.perf_counter()
        self._theirs.run()
        self._megatron.append(time.perf_counter() - begin)
        if cycle == self._case.cycles - 1:
            self._theirs.check()

    def _check(self, last: bool) -> None:
        """Every byte, after the clock has stopped; the last refit's alone, for it takes longer than all refits."""
        if last and self.target is not None:
            self._wrong += pattern.wrong_bytes(self.target.layout(), self.target.memory(), 1)

    def _meet(self, key: str) -> None:
        bare.meet(self._store, f"bench/{key}", self._members, self._deadline)

    def result(self) -> MemberResult:
        """What was measured."""
        return MemberResult(
            name=self._seat.name,
            bytes=self._reports[-1].bytes if self.target is not None else 0,
            joins=self._joins,
            refits=[report.seconds for report in self._reports],
            pauses=[seconds for report in self._reports for seconds in _pause(report)],
            beside_pauses=self._beside_pauses,
            beside_seconds=self._beside,
            bare_bytes=self._bare_bytes if self._bare else 0,
            bare_seconds=self._bare,
            tensor_by_tensor_seconds=self._by_tensor,
            megatron_seconds=self._megatron,
            registrations=[report.registrations for report in self._reports],
            allocations=[report.allocations for report in self._reports],
            store_operations=[report.store_operations for report in self._reports],
            extra_peak_bytes=self._extra,
            wrong_bytes=self._wrong,
        )


def _pause(report: Report) -> list[float]:
    return [report.seconds["pause"]] if "pause" in report.seconds else []


def _adapter(side: tuple[str, dict[str, int]]) -> Adapter:
    adapter: Adapter = load("weft.adapters", side[0])
    return adapter
