"""`weft doctor`: asks, sorts the answers by where they come from, and shows them."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weft.diagnosis import GROUP, Finding
from weft.plugins import GROUPS
from weft_cli.doctor import versions
from weft_cli.doctor.asking import ask

_COLOURS = {"ok": "green", "note": "yellow", "broken": "red"}


class Section(msgspec.Struct, frozen=True):
    """Findings that come from one place."""

    name: str
    """`machine`, `torch`, `versions`, or a distribution that brings plug-ins, with its version."""
    findings: list[Finding]


def examine(root: Path, seconds: float) -> list[Section]:
    """Everything there is to say; `seconds` for every question that may hang. Raises nothing for what is absent."""
    asked: dict[str, list[str]] = {"machine": ["module:machine"], "torch": ["module:torch_here"]}
    for group in (*GROUPS, GROUP):
        for point in sorted(entry_points(group=group), key=lambda point: point.name):
            origin = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
            questions = asked.setdefault(origin, [])
            if f"{group}:{point.name}" not in questions:
                questions.append(f"{group}:{point.name}")
    answers = ask(list(dict.fromkeys(question for of in asked.values() for question in of)), root, seconds)
    sections = [Section(name, [found for each in of for found in answers[each]]) for name, of in asked.items()]
    own = Section("versions", versions.findings(versions.installed()))
    return [*sections[:2], own, *sorted(sections[2:], key=lambda section: section.name)]


def show(*, root: Path, seconds: float, as_json: bool) -> bool:
    """Print what is found. Returns whether nothing is broken."""
    sections = examine(root, seconds)
    broken = [found for section in sections for found in section.findings if found.state == "broken"]
    if as_json:
        report = {"broken": len(broken), "sections": sections}
        typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
        return not broken
    console = Console()
    console.print(_table(sections))
    fixes = [found for section in sections for found in section.findings if found.fix]
    for found in sorted(fixes, key=lambda found: found.state != "broken"):
        colour = _COLOURS[found.state]
        console.print(f"[{colour}]{escape(found.subject)}[/]: {escape(found.fix)}", highlight=False, soft_wrap=True)
    console.print(f"{len(broken)} broken" if broken else "nothing is broken")
    return not broken


def _table(sections: list[Section]) -> Table:
    table = Table("", "", "state", "found", box=None, pad_edge=False, show_header=False)
    for section in sections:
        for n, found in enumerate(section.findings):
            state = f"[{_COLOURS[found.state]}]{found.state}[/]"
            table.add_row("" if n else escape(section.name), escape(found.subject), state, escape(found.text))
    return table
