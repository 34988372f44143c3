"""Runs of one length at a time, moved straight and packed, by whole refits in turn: what a transport should pack."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

import msgspec
import torch

from weft.box import Box
from weft.builder import LayoutBuilder
from weft.contracts import Store
from weft.deadline import Deadline, Deadlines
from weft.layout import Layout
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.store_server import serve_store
from weft.stores import open_store
from weft.testing.members import MemorySource, MemoryTarget
from weft_cli.bench import bare, pattern
from weft_cli.bench.endpoints import make_transport
from weft_cli.bench.processes import run_processes

RUN_BYTES = tuple(256 << n for n in range(15))
_WAYS = {"straight": 1, "packed": 1 << 40}
"""`Policy.direct_run_bytes` of each."""
STRIDED: Mapping[str, tuple[int, int]] = {"source": (0, 1), "target": (1, 0)}
"""`order` of each role's `runs_layout`."""
_MOST_BYTES, _MOST_RUNS = 64 << 20, 1 << 15
_REFITS = 9
"""Of each way and length; the first is cold."""
_SECONDS = 600.0


class PackingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One length of runs."""

    run_bytes: int
    bytes: int
    """Of all runs together."""
    straight_seconds_median: float
    packed_seconds_median: float
    straight_over_packed: float
    """Above 1 packing is the faster way."""
    wrong_bytes: int


class Packing(msgspec.Struct, frozen=True, kw_only=True):
    """All lengths over one transport."""

    transport: str
    direct_run_bytes: int
    """What the transport says."""
    best_direct_run_bytes: int
    """The length measured from which on runs had best move straight; twice the longest if packing is always faster."""
    rows: list[PackingRow]


class _Measured(msgspec.Struct, frozen=True):
    """What one end saw of one length."""

    seconds: dict[str, list[float]]
    wrong_bytes: int


def run_packing(name: str, lengths: Sequence[int] = RUN_BYTES, most_bytes: int = _MOST_BYTES) -> Packing:
    """The figures of one transport. Raises `WeftError` when an end fails."""
    seats = {role: role.encode() for role in ("source", "target")}
    with serve_store() as server:
        what = msgspec.msgpack.encode((name, lengths, most_bytes))
        answers = run_processes(_run_end, server.url, seats, what, _SECONDS)
    ends = [msgspec.msgpack.decode(answer, type=list[_Measured]) for answer in answers.values()]
    rows = [_row(length, most_bytes, both) for length, *both in zip(lengths, *ends, strict=True)]
    declared = make_transport(name).capabilities.direct_run_bytes
    return Packing(transport=name, direct_run_bytes=declared, best_direct_run_bytes=best_threshold(rows), rows=rows)


def best_threshold(rows: Sequence[PackingRow]) -> int:
    """The length with which the rows together, in order of length, lose least against the faster way of each.

    One figure out of line, as on a busy machine, does not move it far, as it would the first length that is faster.
    """
    gains = [math.log(row.straight_over_packed) for row in rows]
    lost = [sum(gains[n:]) for n in range(len(rows) + 1)]  # by what moves straight from there on
    best = lost.index(min(lost))
    return rows[best].run_bytes if best < len(rows) else 2 * rows[-1].run_bytes


def _row(length: int, most_bytes: int, ends: Sequence[_Measured]) -> PackingRow:
    took = {}
    for way in _WAYS:
        slowest = [max(times) for times in zip(*(end.seconds[way] for end in ends), strict=True)]
        took[way] = median(slowest[1:])
    return PackingRow(
        run_bytes=length,
        bytes=_runs(length, most_bytes) * length,
        straight_seconds_median=took["straight"],
        packed_seconds_median=took["packed"],
        straight_over_packed=took["straight"] / took["packed"],
        wrong_bytes=sum(end.wrong_bytes for end in ends),
    )


def _run_end(seat: bytes, url: str, what: bytes, results: Connection) -> None:
    os.dup2(2, 1)  # NIXL says hello on the standard output, which is for figures
    torch.set_num_threads(1)
    name, lengths, most_bytes = msgspec.msgpack.decode(what, type=tuple[str, list[int], int])
    deadline = Deadline.after(_SECONDS)
    store = open_store(url, deadline)
    measure = partial(_measure, name, seat.decode(), url, store, deadline)
    results.send_bytes(msgspec.msgpack.encode([measure(length, _runs(length, most_bytes)) for length in lengths]))
    store.close()


def _measure(name: str, role: str, url: str, store: Store, deadline: Deadline, length: int, runs: int) -> _Measured:
    layout = runs_layout(length, runs, STRIDED[role])
    source = MemorySource(role, layout) if role == "source" else None
    target = MemoryTarget(role, layout) if role == "target" else None
    if source is not None:
        pattern.fill(layout, source.memory(), 1)
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    wrong = 0
    with ExitStack() as stack:
        refits = {}
        for way, threshold in _WAYS.items():
            refits[way] = Refit(
                source=source, target=target, transport=name, store=url, job=f"{length}/{way}", name=role,
                replica=None if target is None else "replica", replica_size=1,
                expect=Expect(sources=1, replicas=1), policy=Policy(digests=False, direct_run_bytes=threshold),
                deadlines=Deadlines(rendezvous=deadline.remaining()),
            )  # fmt: skip
            refits[way].open()
            stack.callback(refits[way].close)
        for number in range(_REFITS):
            for way in list(_WAYS)[:: -1 if number % 2 else 1]:
                if target is not None:
                    target.poison()
                bare.meet(store, f"bench/{length}/{way}/{number}", 2, deadline)
                seconds[way].append(refits[way].run(number + 1).seconds["total"])
                if target is not None and number == _REFITS - 1:
                    wrong += pattern.wrong_bytes(layout, target.memory(), 1)
    return _Measured(seconds, wrong)


def runs_layout(length: int, runs: int, order: tuple[int, int]) -> Layout:
    """Runs whose neighbours differ at both ends and from the logical tensor's: packing has to gather and to scatter."""
    factors = (2, 2, runs // 4, length)
    builder = LayoutBuilder()
    builder.tensor("runs", (runs, length), "uint8")
    builder.buffer("memory", "uint8", runs * length, group="all")
    strides = tuple(length << place for place in order)
    builder.piece("runs", Box(factors, (0, 0, 0, 0), factors), "memory", 0, (*strides, 4 * length, 1))
    return builder.build()


def _runs(length: int, most_bytes: int) -> int:
    return max(4, min(most_bytes // length, _MOST_RUNS) // 4 * 4)
