"""`weft diff`: what tells two plans apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from weft_cli.diff import Difference, diff
from weft_cli.plan_command import console
from weft_cli.planning import read_plan

_MOST_ROWS = 16
"""Names and pairs listed one by one; `--json` has them all."""


def show(before: Path, after: Path, *, as_json: bool) -> bool:
    """Compare, print, and say whether they are equal. Raises what `read_plan` raises."""
    found = diff(read_plan(before), read_plan(after))
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        _print(found, console())
    return found.equal


def _print(found: Difference, output: Console) -> None:
    if found.equal:
        output.print(f"equal; fingerprints {found.fingerprints[0][:16]} and {found.fingerprints[1][:16]}")
        return
    for label, changes in (("member", found.members), ("tensor", found.tensors)):
        _list(output, f"{label} added", changes.added)
        _list(output, f"{label} removed", changes.removed)
        _list(output, f"{label} changed", changes.changed)
    _list(output, "policy changed", found.policy)
    output.print(
        f"copies: {found.copies_removed:,} of {found.bytes_removed:,} bytes removed, "
        f"{found.copies_added:,} of {found.bytes_added:,} bytes added"
    )
    table = Table("from", "to", "bytes before", "bytes after", box=None, pad_edge=False)
    for pair in found.pairs[:_MOST_ROWS]:
        table.add_row(pair.source, pair.target, f"{pair.before:,}", f"{pair.after:,}")
    if found.pairs:
        output.print(table)
    if len(found.pairs) > _MOST_ROWS:
        output.print(f"and {len(found.pairs) - _MOST_ROWS} more pairs: see all with --json")


def _list(output: Console, label: str, lines: Sequence[str]) -> None:
    for line in lines[:_MOST_ROWS]:
        output.print(f"{label}: {line}", highlight=False, markup=False)
    if len(lines) > _MOST_ROWS:
        output.print(f"{label}: {len(lines) - _MOST_ROWS} more, see all with --json")
