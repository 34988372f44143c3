"""A figure of the first cycles: a bar for every member and cycle, stacked by phase."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.errors import ConfigError

PHASES = ("allocate", "register", "join", "gather", "digest", "wire", "land", "commit")
"""From the bottom up; together the whole cycle."""
_KINDS = {".html": ("plotly",), ".png": ("plotly", "kaleido"), ".svg": ("plotly", "kaleido")}


def check(file: Path) -> None:
    """Raise `ConfigError` when this kind of file cannot be written here, before anything is measured."""
    if file.suffix not in _KINDS:
        raise ConfigError(f"--plot {file}: the name must end with one of {', '.join(_KINDS)}")
    missing = [name for name in _KINDS[file.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        other = "" if file.suffix == ".html" else "; a file ending with .html needs no kaleido"
        raise ConfigError(f"--plot {file} needs what is not installed here: pip install {' '.join(missing)}{other}")


def write(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the figure of rows of `rows.row`."""
    output = importlib.import_module("plotly.io")
    if file.suffix == ".html":
        output.write_html(figure(rows), file, include_plotlyjs=True)
    else:
        output.write_image(figure(rows), file)


def figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figure as plotly's JSON: milliseconds by phase."""
    bars = [
        (f"{row['case']}, digests {'on' if row['digests'] else 'off'}", f"{name}, cycle {number}", phases)
        for row in rows
        for name, cycles in row["cycles"].items()
        for number, phases in enumerate(cycles, 1)
    ]
    places = [[case for case, _, _ in bars], [member for _, member, _ in bars]]
    return {
        "data": [
            {"type": "bar", "name": phase, "x": places, "y": [phases[phase] * 1e3 for _, _, phases in bars]}
            for phase in PHASES
        ],
        "layout": {
            "barmode": "stack",
            "title": {"text": "The first refits, by member and phase"},
            "yaxis": {"title": {"text": "milliseconds"}},
        },
    }
