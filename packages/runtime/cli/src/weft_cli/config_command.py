"""`weft config`: the configuration as weft would read it, and what there is to configure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from weft.config import SECTIONS, load_config
from weft.options import REQUIRED, Field, fields
from weft.plugins import declared_options
from weft.variables import TRANSPORT, variable

_COLUMNS = "option", "type", "unit", "range", "default", "meaning"


def show(file: Path | None, *, as_json: bool) -> None:
    """Print every value and where it comes from. Raises `ConfigError` for a configuration that is wrong."""
    config = load_config(file=file)
    if as_json:
        values = [{"key": one.key, "value": _plain(one.value), "origin": one.origin} for one in config.values]
        _print_json({"values": values, "unread": config.unread})
        return
    table = Table("key", "value", "origin", box=None, pad_edge=False)
    for one in config.values:
        table.add_row(one.key, _words(one.value), one.origin)
    Console(soft_wrap=True).print(table)
    if config.unread:
        typer.echo(f"not read: {', '.join(config.unread)}")


def explain(*, as_json: bool) -> None:
    """Print every field of every section, and every option of every transport that is installed."""
    if as_json:
        _print_json([row for title, transport, kind in _kinds() for row in _rows(title, transport, kind)])
        return
    console = Console(soft_wrap=True)
    for title, transport, kind in _kinds():
        console.print(f"\n{_heading(title, transport)}", style="bold", markup=False)
        for field in fields(kind):
            known = ", ".join(filter(None, (field.type, field.unit, field.range, _default(field))))
            console.print(f"  {field.name}  ({known})  {variable(title, field.name, transport)}", markup=False)
            console.print(f"      {field.doc}", markup=False)


def markdown() -> str:
    """The same as the tables of the documentation."""
    lines = []
    for title, transport, kind in _kinds():
        lines += [
            f"### {_heading(title, transport)}",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "| --- " * len(_COLUMNS) + "|",
        ]
        for field in fields(kind):
            cells = f"`{field.name}`", field.type, field.unit, field.range, _default(field, code=True), field.doc
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _kinds() -> Iterator[tuple[str, str, type]]:
    """Section, transport and struct."""
    for section, kind in SECTIONS.items():
        yield section, "", kind
    for name, kind in declared_options().items():
        yield TRANSPORT, name, kind


def _heading(section: str, transport: str) -> str:
    if transport:
        return f"Transport {transport}"
    return f"Section {section}" if section else "Settings"


def _rows(section: str, transport: str, kind: type) -> Iterator[dict[str, Any]]:
    for field in fields(kind):
        required = field.default is REQUIRED
        yield {
            "section": section,
            "transport": transport or None,
            "name": field.name,
            "variable": variable(section, field.name, transport),
            "type": field.type,
            "unit": field.unit,
            "range": field.range,
            "required": required,
            "default": None if required else _plain(field.default),
            "documentation": field.doc,
        }


def _default(field: Field, *, code: bool = False) -> str:
    if field.default is REQUIRED:
        return "required"
    words = _words(field.default)
    if code:
        return f"`{words}`" if words else "none"
    return f"default {words or 'none'}"


def _words(value: Any) -> str:
    """A value as people write it; empty for none."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return f"{value:,}"
        case None | "" | () | {}:
            return ""
        case tuple() if all(isinstance(one, str) for one in value):
            return ", ".join(value)
        case tuple() | dict():
            return msgspec.json.encode(_plain(value)).decode()
    return f"{value}"


def _plain(value: Any) -> Any:
    """For JSON; objects of the program, which only Python can give, as their own words."""
    return msgspec.to_builtins(value, enc_hook=repr)


def _print_json(what: Any) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(what), indent=2).decode())
