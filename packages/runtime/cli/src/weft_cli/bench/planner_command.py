"""`weft bench planner`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from weft.errors import ConfigError
from weft_cli.bench.beside import run_beside
from weft_cli.bench.planner import CASES, run_planner_case
from weft_cli.bench.results import BesideRow, PlannerRow
from weft_cli.models import load_config
from weft_cli.plan_command import console

BESIDE_MODEL = "qwen3-30b-a3b"
_SECONDS = 1800.0
Row = TypeVar("Row", PlannerRow, BesideRow)


def planner(names: Sequence[str], save: Path | None, *, as_json: bool) -> None:
    """Run the named cases, or all, and print a row for each. Raises `ConfigError` for a case that is not there."""
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in [known[name] for name in names] or CASES:
        with Console(stderr=True).status(f"{case.name}: {case.source} to {case.target}"):
            rows.append(run_planner_case(case, load_config(case.model), save, _SECONDS))
    _show(rows, _table(rows), as_json=as_json)


def beside_megatron(ranks: Sequence[int], *, as_json: bool) -> None:
    """Run both planners for every number of ranks, and print a row for each."""
    rows = []
    for count in ranks:
        with Console(stderr=True).status(f"{count} source ranks, weft and Megatron-Core"):
            rows.append(run_beside(BESIDE_MODEL, load_config(BESIDE_MODEL), count, _SECONDS))
    _show(rows, _beside_table(rows), as_json=as_json)


def _show(rows: Sequence[Row], table: Table, *, as_json: bool) -> None:
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(rows), indent=1).decode())
    else:
        console().print(table)


def _table(rows: Sequence[PlannerRow]) -> Table:
    columns = (
        "case", "ranks", "tensors", "copies", "segments", "TB between hosts", "once per host", "plan s", "decode s",
        "slices s", "rank s", "sort s", "peak MB", "egress / mean", "/ bound", "ingress / bound", "peers", "bytes read",
    )  # fmt: skip
    table = Table(*columns, title="Global plans, each in a process of its own", box=None, pad_edge=False)
    for row in rows:
        seconds = row.plan_seconds, row.decode_seconds, row.slices_seconds
        table.add_row(
            row.case, f"{row.source_ranks} to {row.target_ranks}", f"{row.logical_tensors:,}", f"{row.copies:,}",
            f"{row.segments:,}", f"{row.cross_host_bytes / 1e12:.2f}", f"{row.once_per_host_bytes / 1e12:.2f}",
            *(f"{each:.2f}" for each in seconds), f"{row.rank_plan_seconds:.3f}",
            f"{row.calibration_sort_seconds:.2f}", f"{row.peak_rss_bytes / 1e6:,.0f}",
            f"{row.egress_max_over_mean:.3f}", f"{row.egress_over_bound:.3f}", f"{row.ingress_over_bound:.3f}",
            str(row.peers_per_rank_max), f"{row.bytes_per_member_read:,}",
        )  # fmt: skip
    return table


def _beside_table(rows: Sequence[BesideRow]) -> Table:
    columns = ("source ranks", "planner", "seconds", "MB", "messages", "of the busiest", "busiest / mean")
    table = Table(*columns, title="weft and Megatron-Core on the same case", box=None, pad_edge=False)
    for row in rows:
        for name, made in (("weft", row.weft), (f"megatron-core {row.megatron_version}", row.megatron)):
            table.add_row(
                str(row.source_ranks), name, f"{made.seconds:.2f}", f"{made.memory_bytes / 1e6:,.0f}",
                f"{made.operations:,}", f"{made.operations_busiest:,}", f"{made.egress_max_over_mean:.2f}",
            )  # fmt: skip
        ratios = row.ratios
        table.add_row(
            "", "ratio", f"{ratios['seconds']:.1f}", f"{ratios['memory']:.1f}", f"{ratios['operations']:.1f}",
            f"{ratios['operations_busiest']:.1f}", f"{ratios['balance']:.2f}",
        )  # fmt: skip
    return table
