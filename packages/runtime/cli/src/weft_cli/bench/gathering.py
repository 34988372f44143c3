"""Many sources' packed bytes for one target: each sends its own, or one gathers them all and sends once."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from statistics import median

import msgspec
import numpy as np
import torch

from weft.contracts import SEGMENT, Bucket, TransferProgram
from weft.deadline import Deadline
from weft.errors import DeadlineError
from weft.member import RemoteRegion, Tag
from weft.store_server import serve_store
from weft.stores import open_store
from weft_cli.bench import bare, endpoints
from weft_cli.bench.processes import run_processes

TOTALS = tuple(4096 << n for n in range(11))
_REPEATS = 31
"""Of each way and size, after one that warms up."""
_TARGET = 0
"""Its number; sources count from 1, and the first of them gathers."""
_SECONDS = 300.0
_ROUND_SECONDS = 30.0


class GatheringRow(msgspec.Struct, frozen=True, kw_only=True):
    """One size. Seconds run at the target, from its word that it is ready until everything has arrived."""

    transport: str
    sources: int
    bytes: int
    """Of all sources together."""
    each_seconds_median: float
    gathered_seconds_median: float
    each_over_gathered: float
    """Above 1 gathering is the faster way."""
    wrong_bytes: int


class _Measured(msgspec.Struct, frozen=True):
    """What the target saw of one size."""

    each: list[float]
    gathered: list[float]
    wrong_bytes: int


def run_gathering(name: str, sources: int, totals: Sequence[int] = TOTALS) -> list[GatheringRow]:
    """A row per size, each a multiple of `sources`. Raises `WeftError` when a process fails."""
    what = msgspec.msgpack.encode((name, sources, totals))
    seats = {_name(number): str(number).encode() for number in range(1 + sources)}
    with serve_store() as server:
        answers = run_processes(_run_end, server.url, seats, what, _SECONDS)
    found = msgspec.msgpack.decode(answers[_name(_TARGET)], type=list[_Measured])
    return [_row(name, sources, total, measured) for total, measured in zip(totals, found, strict=True)]


def _row(name: str, sources: int, total: int, measured: _Measured) -> GatheringRow:
    each, gathered = median(measured.each[1:]), median(measured.gathered[1:])
    return GatheringRow(
        transport=name, sources=sources, bytes=total, each_seconds_median=each, gathered_seconds_median=gathered,
        each_over_gathered=each / gathered, wrong_bytes=measured.wrong_bytes,
    )  # fmt: skip


def _name(number: int) -> str:
    return f"source/{number}" if number else "target"


def _run_end(seat: bytes, url: str, what: bytes, results: Connection) -> None:
    os.dup2(2, 1)  # NIXL says hello on the standard output, which is for figures
    torch.set_num_threads(1)
    name, sources, totals = msgspec.msgpack.decode(what, type=tuple[str, int, list[int]])
    with ExitStack() as stack:
        end = _End(int(seat), url, name, sources, totals, stack)
        results.send_bytes(msgspec.msgpack.encode([end.measure(total) for total in totals]))


class _End:
    """The target or a source. In every round the target says that it is ready; nobody is ahead of it by more."""

    def __init__(self, number: int, url: str, name: str, sources: int, totals: Sequence[int], stack: ExitStack) -> None:
        self._number, self._sources = number, sources
        self._me, self._deadline = endpoints.member(_name(number)), Deadline.after(_SECONDS)
        self._transport = endpoints.make_transport(name)
        stack.callback(self._transport.close)
        store = open_store(url, self._deadline)
        stack.callback(store.close)
        self._region = endpoints.region(max(totals))
        self._pattern = torch.arange(max(totals)).remainder(251).to(torch.uint8)
        self._transport.open(self._me)
        self._transport.register(self._region, self._deadline)
        mine = self._transport.address(), endpoints.remote(self._region)
        store.set(f"bench/{self._me.name}", msgspec.msgpack.encode(mine))
        remote = {}
        for peer in (_name(n) for n in range(1 + sources) if n != number):
            record = bare.wait_for(store, f"bench/{peer}", self._deadline)
            address, theirs = msgspec.msgpack.decode(record, type=tuple[bytes, RemoteRegion])
            self._transport.connect(endpoints.member(peer), address, self._deadline)
            remote[peer] = (theirs,)
        self._buckets: dict[tuple[int, int, bool], int] = {}
        sends, receives = self._divide(totals)
        program = TransferProgram(b"benchmark", tuple(sends), tuple(receives), (self._region,), remote)
        self._prepared = self._transport.prepare(program, self._deadline)
        self._version = self._arrived = self._ready = 0

    def _divide(self, totals: Sequence[int]) -> tuple[list[Bucket], list[Bucket]]:
        """One bucket for each size, source and way: its share to the target and to the first source, or everything."""
        sends: list[Bucket] = []
        receives: list[Bucket] = []
        for total in totals:
            share = total // self._sources
            for source in range(1, 1 + self._sources):
                moves = [(_TARGET, False, (source - 1) * share, share)]
                moves.append((_TARGET, True, 0, total) if source == 1 else (1, True, (source - 1) * share, share))
                for to, gathered, start, nbytes in moves:
                    index = len(self._buckets)
                    self._buckets[total, source, gathered] = index
                    segment = np.zeros(1, dtype=SEGMENT)
                    segment["offset"] = segment["remote_offset"] = start
                    segment["nbytes"] = nbytes
                    if self._number == source:
                        sends.append(Bucket(index, _name(to), segment))
                    elif self._number == to:
                        receives.append(Bucket(index, _name(source), segment))
        return sends, receives

    def measure(self, total: int) -> _Measured:
        """All of one size, both ways in turn."""
        seconds: dict[bool, list[float]] = {False: [], True: []}
        wrong = 0
        for repeat in range(1 + _REPEATS):
            for gathered in (False, True):
                self._fill(total)
                seconds[gathered].append(self._round(total, gathered))
                if self._number == _TARGET and repeat == _REPEATS:
                    wrong += int((self._region.memory[:total] != self._pattern[:total]).sum())
        return _Measured(seconds[False], seconds[True], wrong)

    def _fill(self, total: int) -> None:
        """A source has its own share alone, the target nothing."""
        self._region.memory[:total].fill_(255)  # which the pattern has nowhere
        if self._number != _TARGET:
            share = total // self._sources
            own = slice((self._number - 1) * share, self._number * share)
            self._region.memory[own] = self._pattern[own]

    def _round(self, total: int, gathered: bool) -> float:
        """Sources say that they have filled, the target that it is ready, and at its end that all may go on."""
        self._version += 1
        if self._number == _TARGET:
            self._wait(self._sources, 0)
            begin = time.perf_counter()
            self._tell(range(1, 1 + self._sources))
            self._wait(0, 1 if gathered else self._sources)
            took = time.perf_counter() - begin
            self._tell(range(1, 1 + self._sources))
            return took
        self._tell([_TARGET])
        self._wait(1, 0)
        if gathered and self._number == 1:
            self._wait(0, self._sources - 1)
        work = self._transport.post(
            self._prepared, self._buckets[total, self._number, gathered], self._tag(), b"", None
        )
        end = time.monotonic() + _ROUND_SECONDS
        while not work.poll():
            self._pause(end)
        self._wait(1, 0)
        return 0.0

    def _tell(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._transport.signal(_name(number), self._tag(), b"")

    def _wait(self, signals: int, buckets: int) -> None:
        """For as many of each; what comes before its turn is kept."""
        end = time.monotonic() + _ROUND_SECONDS
        while self._ready < signals or self._arrived < buckets:
            messages = self._transport.poll()
            self._arrived += sum(message.bucket is not None for message in messages)
            self._ready += sum(message.bucket is None for message in messages)
            if not messages:
                self._pause(end)
        self._ready -= signals
        self._arrived -= buckets

    def _pause(self, end: float) -> None:
        """More processes than processors: whoever spins takes one from those who copy."""
        time.sleep(bare.PAUSE_SECONDS / 4)
        if time.monotonic() > end:
            raise DeadlineError(f"{self._me.name} of the benchmark", _ROUND_SECONDS, [])

    def _tag(self) -> Tag:
        return Tag(self._version, self._me.name, self._me.incarnation, self._me.memory_epoch)
