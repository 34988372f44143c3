"""What registering memory and preparing segments cost: one allocation against a registration for every tensor."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import msgspec
import torch

from weft.contracts import Transport
from weft.deadline import Deadline
from weft.member import Region
from weft_cli.bench import endpoints
from weft_cli.bench.isolated import in_own_process

_SECONDS = 300.0
_REPEATS = 5
_TENSOR_BYTES = 100 << 10


class Sizes(msgspec.Struct, frozen=True):
    """How much is registered and prepared."""

    region_bytes: int = 1 << 30
    tensors: int = 10_000
    segments: tuple[int, ...] = (1_000, 10_000, 100_000)


def run_registration(name: str, sizes: Sizes) -> list[Mapping[str, Any]]:
    """A row for each way. Raises `WeftError` when the process fails."""
    answer = in_own_process(_measure, msgspec.msgpack.encode((name, sizes)), _SECONDS)
    rows: list[Mapping[str, Any]] = msgspec.msgpack.decode(answer)
    return rows


def _measure(argument: bytes) -> bytes:
    os.dup2(2, 1)  # NIXL says hello on the standard output, which is for figures
    name, sizes = msgspec.msgpack.decode(argument, type=tuple[str, Sizes])
    deadline = Deadline.after(_SECONDS)
    ends = {role: endpoints.make_transport(name) for role in ("sender", "receiver")}
    try:
        for role, end in ends.items():
            end.open(endpoints.member(role))
        rows = _registrations(name, ends["sender"], sizes, deadline)
        rows += _preparations(name, ends, sizes.segments, deadline)
    finally:
        for end in ends.values():
            end.close()
    return msgspec.msgpack.encode(rows)


def _registrations(name: str, transport: Transport, sizes: Sizes, deadline: Deadline) -> list[Mapping[str, Any]]:
    whole = [endpoints.region(sizes.region_bytes)]
    rows = [_row(name, "one allocation", 1, sizes.region_bytes, _register(transport, whole, deadline))]
    tensors = [Region(f"tensor {n}", torch.zeros(_TENSOR_BYTES, dtype=torch.uint8)) for n in range(sizes.tensors)]
    seconds = _register(transport, tensors, deadline)
    return [*rows, _row(name, "tensor by tensor", sizes.tensors, sizes.tensors * _TENSOR_BYTES, seconds)]


def _register(transport: Transport, regions: Sequence[Region], deadline: Deadline) -> list[float]:
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        made = [transport.register(region, deadline) for region in regions]
        times.append(time.perf_counter() - begin)
        for registration in made:
            transport.deregister(registration)
    return times


def _preparations(
    name: str, ends: Mapping[str, Transport], counts: Sequence[int], deadline: Deadline
) -> list[Mapping[str, Any]]:
    """Of the sender alone: receivers prepare less."""
    nbytes = 1 << 10
    regions = {role: endpoints.region(max(counts) * (nbytes + endpoints.GAP_BYTES)) for role in ends}
    for role, end in ends.items():
        end.register(regions[role], deadline)
    addresses = {role: end.address() for role, end in ends.items()}
    ends["sender"].connect(endpoints.member("receiver"), addresses["receiver"], deadline)
    ends["receiver"].connect(endpoints.member("sender"), addresses["sender"], deadline)
    rows = []
    sender = ends["sender"]
    for count in counts:
        sends = list(endpoints.buckets("receiver", 0, count, nbytes, sender.capabilities))
        program = endpoints.program(sends, [], regions["sender"], "receiver", endpoints.remote(regions["receiver"]))
        times = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            prepared = sender.prepare(program, deadline)
            times.append(time.perf_counter() - begin)
            sender.release(prepared)
        rows.append(_row(name, "prepare segments", count, count * nbytes, times))
    return rows


def _row(transport: str, case: str, count: int, nbytes: int, times: Sequence[float]) -> Mapping[str, Any]:
    seconds = median(times)
    return {
        "case": case, "transport": transport, "count": count, "bytes": nbytes, "first_seconds": times[0],
        "seconds_median": seconds, "microseconds_each": seconds / count * 1e6,
    }  # fmt: skip
