"""The figures of a case, from what its members measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from weft.errors import WeftError
from weft_cli.bench.settings import Case, MemberResult

SHOWN_CYCLES = 3


def row(case: Case, members: Sequence[MemberResult]) -> Mapping[str, Any]:
    """The figures of a case. A cycle lasts as long as its slowest member; the best chunk size is the raw limit.

    Seconds are medians over the warm cycles; without reuse there is none, and joining is part of all of them.
    """
    totals = [max(member.total(cycle) for member in members) for cycle in range(case.cycles)]
    warm = totals[1:]
    seconds, nbytes = median(warm), sum(member.bytes for member in members)
    limit = _limit(members, nbytes)
    beside, by_tensor, megatron = (
        _slowest([getattr(member, field) for member in members])[1:]
        for field in ("beside_seconds", "tensor_by_tensor_seconds", "megatron_seconds")
    )
    pause, beside_pause = (
        _slowest([getattr(member, field) for member in members if member.pauses])[1:]
        for field in ("pauses", "beside_pauses")
    )
    lands_otherwise = case.beside is not None and case.beside.landing != case.policy.landing
    return {
        "case": case.name,
        "source": f"{case.source[0]}:{_sizes(case.source[1])}",
        "target": f"{case.target[0]}:{_sizes(case.target[1])}",
        "transport": case.transport,
        "digests": case.policy.digests,
        "reuse": case.reuse,
        "bytes": nbytes,
        "open_seconds": max(sum(member.joins[0].values()) for member in members),
        "first_seconds": max(member.refits[0]["total"] for member in members),
        "seconds_median": seconds,
        "seconds_warm": warm,
        "gigabytes_per_second": nbytes / seconds / 1e9,
        "raw_seconds_median": limit[1] if limit else None,
        "raw_chunk_bytes": limit[0] if limit else None,
        "raw_gigabytes_per_second": nbytes / limit[1] / 1e9 if limit else None,
        "ratio_to_raw": limit[1] / seconds if limit else None,
        "beside_seconds_median": median(beside) if beside else None,
        "ratio_to_beside": median(beside) / seconds if beside else None,
        "pause_seconds_median": median(pause) if pause else None,
        "beside_pause_seconds_median": median(beside_pause) if lands_otherwise else None,
        "ratio_to_beside_pause": median(beside_pause) / median(pause) if lands_otherwise else None,
        "tensor_by_tensor_seconds_median": median(by_tensor) if by_tensor else None,
        "ratio_to_tensor_by_tensor": median(by_tensor) / seconds if by_tensor else None,
        "megatron_seconds_median": median(megatron) if megatron else None,
        "ratio_to_megatron": median(megatron) / seconds if megatron else None,
        "cycles": {
            member.name: [_phases(member, n) for n in range(min(SHOWN_CYCLES, case.cycles))] for member in members
        },
        "registrations_warm": sum(sum(member.registrations[1:]) for member in members),
        "allocations_warm": sum(sum(member.allocations[1:]) for member in members),
        "store_operations_warm": sum(member.store_operations[-1] for member in members),
        "extra_peak_bytes": max(member.extra_peak_bytes for member in members),
        "wrong_bytes": sum(member.wrong_bytes for member in members),
    }


def check_limit(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `WeftError` that names every row that was faster than the limit: its rate cannot be true."""
    faults = [
        f"{row['case']}{_digests(row)}: {row['gigabytes_per_second']:.2f} GB/s, and bare {row['transport']} at best "
        f"{row['raw_gigabytes_per_second']:.2f}"
        for row in rows
        if above_limit(row)
    ]
    if faults:
        raise WeftError(
            f"rates above the limit of the same run are not printed: {'; '.join(faults)}. Run it when the machine "
            "has less else to do, or with more cycles"
        )


def above_limit(row: Mapping[str, Any]) -> bool:
    """Whether it was faster than bare transfers of its bytes."""
    return row["ratio_to_raw"] is not None and row["ratio_to_raw"] > 1


def _digests(row: Mapping[str, Any]) -> str:
    return f" (digests {'on' if row['digests'] else 'off'})" if "digests" in row else ""


def _limit(members: Sequence[MemberResult], nbytes: int) -> tuple[int, float] | None:
    """The fastest chunk size, and the seconds that `nbytes` take at its median rate; None without bare transfers."""
    senders = [member for member in members if member.bare_seconds]
    if not senders:
        return None
    moved = sum(member.bare_bytes for member in senders)
    medians = {
        chunk: median(_slowest([member.bare_seconds[chunk] for member in senders])) for chunk in senders[0].bare_seconds
    }
    best = min(medians, key=medians.__getitem__)
    return best, medians[best] * nbytes / moved


def _slowest(members: Sequence[Sequence[float]]) -> list[float]:
    """Per cycle."""
    return [max(cycle) for cycle in zip(*members, strict=True)]


def _phases(member: MemberResult, cycle: int) -> dict[str, float]:
    """Seconds of one cycle by phase; `total` includes joining where there was any."""
    join = {"allocate": 0.0, "register": 0.0, "join": 0.0, **member.joins[cycle]}
    refit = member.refits[cycle]
    return {**join, **refit, "total": refit["total"] + sum(join.values())}


def _sizes(parallel: Mapping[str, int]) -> str:
    return ",".join(f"{axis}{size}" for axis, size in parallel.items())
