"""`weft plugins`: what is installed, from which distribution, and whether it imports."""

from __future__ import annotations

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from weft.plugins import GROUPS, PluginInfo, discover


def show(*, as_json: bool) -> None:
    """Print every plug-in of every group. Imports each."""
    found = [(group, info) for group in GROUPS for info in discover(group)]
    if as_json:
        rows = [{"group": group, **msgspec.to_builtins(info)} for group, info in found]
        typer.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return
    Console().print(_table(found))


def _table(found: list[tuple[str, PluginInfo]]) -> Table:
    table = Table("group", "name", "distribution", "version", "state", box=None, pad_edge=False)
    for group, info in found:
        state = info.state if info.state == "ok" else f"{info.state}: {info.reason}"
        table.add_row(group, info.name, info.distribution, info.version, state)
    return table
