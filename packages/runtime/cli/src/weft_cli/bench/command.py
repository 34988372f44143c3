"""`weft bench refit`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from weft_cli.bench.run import run_case
from weft_cli.bench.settings import Case
from weft_cli.models import load_config
from weft_cli.sides import parse_side


def refit(
    model: str,
    source: str,
    target: str,
    transports: Sequence[str],
    digests: Sequence[bool],
    cycles: int,
    *,
    as_json: bool,
) -> None:
    """Run every combination and print a row for each."""
    console = Console(stderr=True)
    rows: list[Mapping[str, Any]] = []
    held, wanted = parse_side(source), parse_side(target)
    for transport in transports:
        for digest in digests:
            case = Case(
                config=dict(load_config(model)),
                source=(held.framework, dict(held.parallel)),
                target=(wanted.framework, dict(wanted.parallel)),
                transport=transport,
                transport_options={},
                digests=digest,
                cycles=cycles,
                dtype="bfloat16",
                seconds=300.0,
            )
            with console.status(f"{model}, {source} to {target} over {transport}, digests {'on' if digest else 'off'}"):
                rows.append(run_case(case))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        output = Console()
        if not output.is_terminal:  # into a file or a pipe: nothing is cut off
            output = Console(width=120)
        output.print(_table(rows))
    if any(row["wrong_bytes"] for row in rows):
        raise typer.Exit(1)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Refits, and bare writes of as many bytes in the same run")
    for column in (
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
        "wrong",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        raw = row["raw_gigabytes_per_second"]
        table.add_row(
            row["transport"], "on" if row["digests"] else "off", f"{row['bytes']:,}", f"{row['first_seconds']:.3f}",
            f"{row['seconds_median']:.3f}", f"{row['gigabytes_per_second']:.2f}", f"{raw:.2f}" if raw else "–",
            f"{row['ratio_to_raw']:.2f}" if raw else "–", str(row["registrations_warm"]), str(row["allocations_warm"]),
            str(row["wrong_bytes"]),
        )  # fmt: skip
    return table
