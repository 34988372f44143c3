"""`weft bench refit`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from weft_cli.bench import plot
from weft_cli.bench.rows import above_limit, check_limit
from weft_cli.bench.run import run_case
from weft_cli.bench.settings import Case
from weft_cli.plan_command import console

_PHASES = ("allocate", "register", "join", "gather", "digest", "wire", "land", "install", "commit", "total")

_WAYS = {
    "beside": "another policy",
    "beside_pause": "another policy, its pause",
    "tensor_by_tensor": "tensor by tensor",
    "megatron": "Megatron-Core's own",
}


def refit(cases: Sequence[Case], *, as_json: bool, figure: Path | None) -> None:
    """Run every case and print a row for each. Raises `WeftError` when a rate is above the limit of its run."""
    if figure is not None:
        plot.check(figure)
    progress = Console(stderr=True)
    measured: list[Mapping[str, Any]] = []
    for case in cases:
        with progress.status(f"{case.name} over {case.transport}, digests {'on' if case.policy.digests else 'off'}"):
            measured.append(run_case(case))
    rows = [row for row in measured if not above_limit(row)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        output = console()
        output.print(_table(rows))
        others = _others(rows)
        if others.rows:
            output.print(others)
        for row in rows:
            output.print(_cycles(row))
    if figure is not None:
        plot.write(plot.cycles(rows), figure)
    check_limit(measured)
    if any(row["wrong_bytes"] for row in rows):
        raise typer.Exit(1)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Refits, and bare transfers of as many bytes in the same run")
    for column in (
        "case",
        "transport",
        "digests",
        "bytes",
        "first s",
        "warm s",
        "GB/s",
        "raw GB/s",
        "ratio",
        "regs",
        "allocs",
        "extra MB",
        "wrong",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        raw = row["raw_gigabytes_per_second"]
        table.add_row(
            row["case"], row["transport"], "on" if row["digests"] else "off", f"{row['bytes']:,}",
            f"{row['first_seconds']:.3f}", f"{row['seconds_median']:.3f}", f"{row['gigabytes_per_second']:.2f}",
            f"{raw:.2f}" if raw else "–", f"{row['ratio_to_raw']:.2f}" if raw else "–", str(row["registrations_warm"]),
            str(row["allocations_warm"]), f"{row['extra_peak_bytes'] / 1e6:.0f}", str(row["wrong_bytes"]),
        )  # fmt: skip
    return table


def _others(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What else has moved the same bytes in turn with the refits."""
    table = Table(title="Other ways, in turn with the refits")
    for column in ("case", "digests", "way", "warm s", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        for field, way in _WAYS.items():
            if row[f"{field}_seconds_median"] is not None:
                table.add_row(
                    row["case"], "on" if row["digests"] else "off", way, f"{row[f'{field}_seconds_median']:.3f}",
                    f"{row[f'ratio_to_{field}']:.2f}",
                )  # fmt: skip
    return table


def _cycles(row: Mapping[str, Any]) -> Table:
    """Seconds of the first cycles by phase, of every member."""
    reused = "" if row["reuse"] else ", joining anew for each"
    table = Table(title=f"{row['case']}, digests {'on' if row['digests'] else 'off'}{reused}: milliseconds")
    for column in ("cycle", "member", *_PHASES):
        table.add_column(column, justify="right")
    for name, cycles in row["cycles"].items():
        for number, phases in enumerate(cycles, 1):
            table.add_row(str(number), name, *(f"{phases[phase] * 1e3:.1f}" for phase in _PHASES))
    return table
