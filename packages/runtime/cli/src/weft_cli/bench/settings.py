"""What is measured, as every process of a benchmark is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark case."""

    config: dict[str, Any]
    """Hugging Face config."""
    source: tuple[str, dict[str, int]]
    """Adapter and parallel sizes."""
    target: tuple[str, dict[str, int]]
    transport: str
    transport_options: dict[str, Any]
    digests: bool
    cycles: int
    """Refits; the first one is cold."""
    dtype: str
    seconds: float
    """Deadline of every stage."""


class MemberResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one member measured. Seconds by cycle."""

    name: str
    bytes: int
    total_seconds: list[float]
    phases: list[dict[str, float]]
    raw_seconds: dict[int, list[float]]
    """Per chunk size in bytes, the bare writes of the same bytes; empty where the transport has no bare form."""
    raw_bytes: int
    """Bytes of one bare write."""
    registrations: list[int]
    allocations: list[int]
    store_operations: list[int]
    open_seconds: float
    """Rendezvous, planning, registration, connecting and preparing."""
    wrong_bytes: int
    """Bytes of a target that are not what an independent slice of the logical tensors gives, after the last refit."""


def row(case: Case, sources: list[MemberResult], targets: list[MemberResult]) -> Mapping[str, Any]:
    """The figures of a case. A cycle lasts as long as its slowest member; the best chunk size is the raw limit."""
    everybody = [*sources, *targets]
    cycles = [max(times) for times in zip(*(m.total_seconds for m in everybody), strict=True)]
    warm = sorted(cycles[1:])
    median = warm[len(warm) // 2]
    nbytes = sum(m.bytes for m in targets)
    chunks = {
        c: [max(t) for t in zip(*(m.raw_seconds[c] for m in sources), strict=True)] for c in sources[0].raw_seconds
    }
    medians = {chunk: sorted(times)[len(times) // 2] for chunk, times in chunks.items()}
    best = min(medians, key=lambda chunk: medians[chunk]) if medians else None
    raw = sum(m.raw_bytes for m in sources) / medians[best] if best is not None else 0.0
    return {
        "case": f"{case.source[0]}:{_sizes(case.source[1])} to {case.target[0]}:{_sizes(case.target[1])}",
        "transport": case.transport,
        "digests": case.digests,
        "bytes": nbytes,
        "open_seconds": max(m.open_seconds for m in everybody),
        "first_seconds": cycles[0],
        "seconds_median": median,
        "seconds_warm": cycles[1:],
        "gigabytes_per_second": nbytes / median / 1e9,
        "raw_seconds_median": medians[best] if best is not None else None,
        "raw_chunk_bytes": best,
        "raw_gigabytes_per_second": raw / 1e9,
        "ratio_to_raw": nbytes / median / raw if raw else None,
        "phases_median_cycle": {m.name: m.phases[1 + _middle(m.total_seconds[1:])] for m in everybody},
        "registrations_warm": sum(sum(m.registrations[1:]) for m in everybody),
        "allocations_warm": sum(sum(m.allocations[1:]) for m in everybody),
        "store_operations_warm": sum(m.store_operations[-1] for m in everybody),
        "wrong_bytes": sum(m.wrong_bytes for m in targets),
    }


def _middle(times: list[float]) -> int:
    return sorted(range(len(times)), key=times.__getitem__)[len(times) // 2]


def _sizes(parallel: Mapping[str, int]) -> str:
    return ",".join(f"{axis}{size}" for axis, size in parallel.items())
