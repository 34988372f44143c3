"""`weft explain`: where each box of a tensor comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import typer
from rich.table import Table

from weft.errors import ConfigError
from weft_cli.explain import Explanation, Origin, explain
from weft_cli.plan_command import Request, console, describe, progress
from weft_cli.planning import make_plan, read_plan

_MOST_ROWS = 32
"""Boxes listed in the table; `--json` has them all."""


def show(what: Sequence[str], model: Request | None, rank: str | None, *, as_json: bool) -> None:
    """Explain and print. `what` is a plan file and a tensor, or a tensor of the plan of `model`.

    Raises `ConfigError` for unknown tensors and ranks, and what loading and planning raise.
    """
    with progress() as report:
        sides = describe(model, report) if model else None
        if len(what) == 2:
            plan = read_plan(Path(what[0]))
        elif len(what) == 1 and model and sides:
            plan = make_plan(sides, model.policy)
        else:
            raise ConfigError("expected PLAN TENSOR, or TENSOR with --model, --source and --target")
        found = explain(plan, what[-1], rank, sides.layouts if sides else None)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    _print(found)


def _print(found: Explanation) -> None:
    output = console()
    dtypes = " to ".join(dict.fromkeys((found.source_dtype, found.target_dtype)))
    output.print(f"{found.tensor} {list(found.shape)} {dtypes}, in plan {found.fingerprint[:16]}", highlight=False)
    table = Table("target", "buffer", "box", "bytes", "from", "its buffer", "because", box=None, pad_edge=False)
    for origin in found.origins[:_MOST_ROWS]:
        table.add_row(
            origin.target, _place(origin.target_buffer, origin.target_offset), origin.box, f"{origin.nbytes:,}",
            origin.source, _place(origin.source_buffer, origin.source_offset), _reason(origin),
        )  # fmt: skip
    output.print(table)
    if len(found.origins) > _MOST_ROWS:
        output.print(f"and {len(found.origins) - _MOST_ROWS} more: choose with --rank, or see all with --json")
    for words in found.unknown:
        output.print(f"unknown: {words}", highlight=False)


def _place(buffer: str, offset: int) -> str:
    return f"{buffer}+{offset:,}" if offset else buffer


def _reason(origin: Origin) -> str:
    if origin.relayed:
        return f"{origin.distance}; passes on what it received{' to another replica' if origin.chained else ''}"
    if origin.holders is None or origin.nearest_holders is None:
        return origin.distance
    if origin.holders == 1:
        return f"{origin.distance}; nobody else holds it"
    if origin.nearest_holders == 1:
        return f"{origin.distance}; the nearest of {origin.holders} holders"
    return (
        f"{origin.distance}; one of {origin.nearest_holders} equally near of {origin.holders} holders, sends "
        f"{origin.share or 0:.1%} of what they send"
    )
