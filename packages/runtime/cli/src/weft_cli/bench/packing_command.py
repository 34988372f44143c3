"""`weft bench packing`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from weft_cli.bench import plot
from weft_cli.bench.gathering import GatheringRow, run_gathering
from weft_cli.bench.packing import Packing, run_packing
from weft_cli.plan_command import console


def packing(names: Sequence[str], *, as_json: bool, figure: Path | None) -> None:
    """Run each transport and print its figures, and which length is best beside what the transport says."""
    if figure is not None:
        plot.check(figure)
    progress = Console(stderr=True)
    found: list[Packing] = []
    for name in names:
        with progress.status(f"runs over {name}, straight and packed"):
            found.append(run_packing(name))
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    else:
        for each in found:
            console().print(_lengths(each))
    if figure is not None:
        plot.write(plot.packing(found), figure)
    _stop_if_wrong(sum(row.wrong_bytes for each in found for row in each.rows))


def gathering(names: Sequence[str], sources: int, *, as_json: bool) -> None:
    """Run each transport and print its rows."""
    rows = [row for name in names for row in run_gathering(name, sources)]
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(rows), indent=1).decode())
    else:
        console().print(_sizes(rows, sources))
    _stop_if_wrong(sum(row.wrong_bytes for row in rows))


def _stop_if_wrong(wrong_bytes: int) -> None:
    if wrong_bytes:
        raise typer.Exit(1)


def _lengths(found: Packing) -> Table:
    table = Table(
        title=f"{found.transport}: refits of runs of one length",
        caption=f"Best: direct_run_bytes = {found.best_direct_run_bytes:,}; "
        f"the transport says {found.direct_run_bytes:,}",
    )
    for column in ("run bytes", "bytes", "straight ms", "packed ms", "straight / packed", "wrong"):
        table.add_column(column, justify="right")
    for row in found.rows:
        table.add_row(
            f"{row.run_bytes:,}", f"{row.bytes:,}", f"{row.straight_seconds_median * 1e3:.2f}",
            f"{row.packed_seconds_median * 1e3:.2f}", f"{row.straight_over_packed:.2f}", str(row.wrong_bytes),
        )  # fmt: skip
    return table


def _sizes(rows: Sequence[GatheringRow], sources: int) -> Table:
    table = Table(title=f"{sources} sources to one target: each by itself, and gathered by the first of them")
    for column in ("transport", "bytes", "each µs", "gathered µs", "each / gathered", "wrong"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.transport, f"{row.bytes:,}", f"{row.each_seconds_median * 1e6:,.0f}",
            f"{row.gathered_seconds_median * 1e6:,.0f}", f"{row.each_over_gathered:.2f}", str(row.wrong_bytes),
        )  # fmt: skip
    return table
