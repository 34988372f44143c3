"""A transport alone, through its contract, in turn with its network's own transfers of as many bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import msgspec
import torch

from weft.contracts import Bucket, Work
from weft.deadline import Deadline
from weft.errors import DeadlineError, WeftError
from weft.member import RemoteRegion, Tag
from weft.replay import POSTED_PER_PEER
from weft.store_server import serve_store
from weft.stores import open_store
from weft_cli.bench import bare, endpoints
from weft_cli.bench.processes import run_processes

_SECONDS = 300.0
_REPEATS, _SHORT_REPEATS = 5, 41
"""Of long and of short transfers (`bare.SHORT_BYTES`)."""


class Shape(msgspec.Struct, frozen=True):
    """Segments that move together."""

    count: int
    nbytes: int
    """Of each."""

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.count * self.nbytes

    def __str__(self) -> str:
        size = f"{self.nbytes >> 20} MiB" if self.nbytes >= 1 << 20 else f"{self.nbytes >> 10} KiB"
        return f"{self.count:,} x {size}"


SHAPES = (*(Shape(1, 4096 << 2 * n) for n in range(8)), Shape(10_000, 100 << 10), Shape(100_000, 1 << 10))


class _Measured(msgspec.Struct, frozen=True):
    """What one end saw of one shape."""

    seconds: list[float]
    bare_seconds: dict[int, list[float]]
    wrong_bytes: int


def run_transport(name: str, shapes: Sequence[Shape] = SHAPES) -> list[Mapping[str, Any]]:
    """A row per shape. Raises `WeftError` when an end fails."""
    seats = {role: role.encode() for role in ("sender", "receiver")}
    with serve_store() as server:
        answers = run_processes(_run_end, server.url, seats, msgspec.msgpack.encode((name, shapes)), _SECONDS)
    ends = {role: msgspec.msgpack.decode(answer, type=list[_Measured]) for role, answer in answers.items()}
    return [
        _row(name, shape, sent, received.wrong_bytes)
        for shape, sent, received in zip(shapes, ends["sender"], ends["receiver"], strict=True)
    ]


def _row(name: str, shape: Shape, sent: _Measured, wrong: int) -> Mapping[str, Any]:
    seconds = median(sent.seconds)
    medians = {chunk: median(times) for chunk, times in sent.bare_seconds.items()}
    best = min(medians, key=medians.__getitem__, default=None)
    return {
        "case": str(shape),
        "transport": name,
        "segments": shape.count,
        "bytes": shape.total,
        "seconds_median": seconds,
        "gigabytes_per_second": shape.total / seconds / 1e9,
        "raw_seconds_median": medians[best] if best is not None else None,
        "raw_chunk_bytes": best,
        "raw_gigabytes_per_second": shape.total / medians[best] / 1e9 if best is not None else None,
        "ratio_to_raw": medians[best] / seconds if best is not None else None,
        "wrong_bytes": wrong,
    }


def _run_end(seat: bytes, url: str, what: bytes, results: Connection) -> None:
    os.dup2(2, 1)  # NIXL says hello on the standard output, which is for figures
    torch.set_num_threads(1)
    name, shapes = msgspec.msgpack.decode(what, type=tuple[str, list[Shape]])
    with ExitStack() as stack:
        end = _End(seat.decode(), url, name, shapes, stack)
        results.send_bytes(msgspec.msgpack.encode([end.measure(shape) for shape in shapes]))


@dataclass(frozen=True, slots=True)
class _Move:
    shape: Shape
    buckets: Sequence[Bucket]


class _End:
    """The sender or the receiver. Both do the same steps, so neither is ever ahead of the other by more than one."""

    def __init__(self, role: str, url: str, name: str, shapes: Sequence[Shape], stack: ExitStack) -> None:
        self._sends, self._deadline = role == "sender", Deadline.after(_SECONDS)
        self._peer = "receiver" if self._sends else "sender"
        self._me = endpoints.member(role)
        self._transport = endpoints.make_transport(name)
        stack.callback(self._transport.close)
        store = open_store(url, self._deadline)
        stack.callback(store.close)
        self._region = endpoints.region(max(shape.count * (shape.nbytes + endpoints.GAP_BYTES) for shape in shapes))
        self._transport.open(self._me)
        self._transport.register(self._region, self._deadline)
        mine = (self._transport.address(), endpoints.remote(self._region))
        store.set(f"bench/{role}", msgspec.msgpack.encode(mine))
        record = bare.wait_for(store, f"bench/{self._peer}", self._deadline)
        address, theirs = msgspec.msgpack.decode(record, type=tuple[bytes, RemoteRegion])
        self._transport.connect(endpoints.member(self._peer), address, self._deadline)
        self._moves: dict[Shape, Sequence[Bucket]] = {}
        every: list[Bucket] = []
        for shape in shapes:
            made = endpoints.buckets(self._peer, len(every), shape.count, shape.nbytes, self._transport.capabilities)
            self._moves[shape] = list(made)
            every += self._moves[shape]
        sends, receives = (every, []) if self._sends else ([], every)
        self._prepared = self._transport.prepare(
            endpoints.program(sends, receives, self._region, self._peer, theirs), self._deadline
        )
        self._version = self._arrived = 0
        self._pattern = torch.randint(
            0, 255, (self._region.nbytes,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
        )
        self._pair: bare.Pair | None = None
        if name in bare.MODULES:
            self._pair = bare.open_pair(
                name, store, "bare", sends=self._sends, memory=self._region.memory, deadline=self._deadline
            )
            stack.callback(self._pair.close)

    def measure(self, shape: Shape) -> _Measured:
        """All of one shape; the first pass of each kind warms up."""
        if self._sends:
            self._region.memory.copy_(self._pattern)
        seconds: list[float] = []
        bare_seconds: dict[int, list[float]] = {}
        for _ in range(1 + (_SHORT_REPEATS if shape.total <= bare.SHORT_BYTES else _REPEATS)):
            seconds.append(self._timed_move(shape))
            for chunk in _chunks(shape.total) if self._pair else ():
                begin = time.perf_counter()
                assert self._pair is not None
                self._pair.move(shape.total, chunk, self._deadline)
                bare_seconds.setdefault(chunk, []).append(time.perf_counter() - begin)
        if not self._sends:
            self._region.memory.fill_(255)  # which the pattern has nowhere
        self._timed_move(shape)
        wrong = 0 if self._sends else self._wrong_bytes(shape)
        return _Measured(seconds[1:], {chunk: times[1:] for chunk, times in bare_seconds.items()}, wrong)

    def _timed_move(self, shape: Shape) -> float:
        """Until the receiver has said that everything is there; it says before that it is ready."""
        self._version += 1
        pause = 0.0 if shape.total <= bare.SHORT_BYTES else bare.PAUSE_SECONDS
        if not self._sends:
            self._signal()
            self._receive(len(self._moves[shape]), pause)
            self._signal()
            return 0.0
        self._receive(1, pause)
        begin = time.perf_counter()
        self._send(self._moves[shape], pause)
        self._receive(1, pause)
        return time.perf_counter() - begin

    def _send(self, buckets: Sequence[Bucket], pause: float) -> None:
        active: list[Work] = []
        for bucket in buckets:
            while len(active) >= POSTED_PER_PEER:
                active = self._still_active(active, pause)
            active.append(self._transport.post(self._prepared, bucket.index, self._tag(), b"", None))
        while active:
            active = self._still_active(active, pause)

    def _still_active(self, works: Sequence[Work], pause: float) -> list[Work]:
        left = [work for work in works if not work.poll()]
        if len(left) == len(works):
            time.sleep(pause)
            self._in_time()
        return left

    def _receive(self, count: int, pause: float) -> None:
        """Of what has arrived, the rest is kept: the peer may be one step ahead."""
        while self._arrived < count:
            arrived = len(self._transport.poll())
            self._arrived += arrived
            if not arrived:
                time.sleep(pause)
                self._in_time()
        self._arrived -= count

    def _signal(self) -> None:
        self._transport.signal(self._peer, self._tag(), b"")

    def _tag(self) -> Tag:
        return Tag(self._version, self._me.name, self._me.incarnation, self._me.memory_epoch)

    def _in_time(self) -> None:
        if self._deadline.expired():
            raise DeadlineError("the benchmark", self._deadline.seconds, [self._peer])

    def _wrong_bytes(self, shape: Shape) -> int:
        step = shape.nbytes + endpoints.GAP_BYTES
        got, expected = (
            memory[: shape.count * step].view(shape.count, step) for memory in (self._region.memory, self._pattern)
        )
        if int((got[:, shape.nbytes :] != 255).sum()):
            raise WeftError(f"{shape}: bytes between the segments have changed")
        return int((got[:, : shape.nbytes] != expected[:, : shape.nbytes]).sum())


def _chunks(nbytes: int) -> Sequence[int]:
    return bare.CHUNK_BYTES if nbytes > bare.CHUNK_BYTES[-1] else [nbytes >> n for n in range(4)]
