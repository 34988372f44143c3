"""`weft bench transport` and `weft bench registration`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.table import Table

from weft_cli.bench.registration import Sizes, run_registration
from weft_cli.bench.rows import above_limit, check_limit
from weft_cli.bench.transport import run_transport
from weft_cli.plan_command import console


def transport(names: Sequence[str], *, as_json: bool) -> None:
    """Run each transport and print its rows. Raises `WeftError` when a rate is above the limit of its run."""
    measured = [row for name in names for row in run_transport(name)]
    rows = [row for row in measured if not above_limit(row)]
    columns = ("transport", "segments", "bytes", "median µs", "GB/s", "raw GB/s", "ratio", "wrong")
    lines = [
        (
            row["transport"], row["case"], f"{row['bytes']:,}", f"{row['seconds_median'] * 1e6:,.0f}",
            f"{row['gigabytes_per_second']:.3f}", _number(row["raw_gigabytes_per_second"], 3),
            _number(row["ratio_to_raw"], 2), str(row["wrong_bytes"]),
        )
        for row in rows
    ]  # fmt: skip
    _show(rows, "Transports alone, and bare transfers of as many bytes in the same run", columns, lines, as_json)
    check_limit(measured)
    if any(row["wrong_bytes"] for row in rows):
        raise typer.Exit(1)


def registration(names: Sequence[str], *, as_json: bool) -> None:
    """Run each transport and print its rows."""
    rows = [row for name in names for row in run_registration(name, Sizes())]
    columns = ("transport", "what", "count", "bytes", "first ms", "median ms", "µs each")
    lines = [
        (
            row["transport"], row["case"], f"{row['count']:,}", f"{row['bytes']:,}",
            f"{row['first_seconds'] * 1e3:.2f}", f"{row['seconds_median'] * 1e3:.2f}",
            f"{row['microseconds_each']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    _show(rows, "Registering and preparing", columns, lines, as_json)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _show(
    rows: Sequence[Mapping[str, Any]], title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], as_json: bool
) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(*line)
    console().print(table)
