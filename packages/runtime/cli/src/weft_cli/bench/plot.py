"""Figures: the first cycles, a bar for every member and cycle stacked by phase; runs straight and packed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft_cli.bench.packing import Packing, PackingRow

PHASES = ("allocate", "register", "join", "gather", "digest", "wire", "land", "install", "commit")
"""From the bottom up; together the whole cycle."""
_KINDS = {".html": ("plotly",), ".png": ("plotly", "kaleido"), ".svg": ("plotly", "kaleido")}
_WAYS: Mapping[str, Callable[[PackingRow], float]] = {
    "straight": lambda row: row.straight_seconds_median,
    "packed": lambda row: row.packed_seconds_median,
}


def check(file: Path) -> None:
    """Raise `ConfigError` when this kind of file cannot be written here, before anything is measured."""
    if file.suffix not in _KINDS:
        raise ConfigError(f"--plot {file}: the name must end with one of {', '.join(_KINDS)}")
    missing = [name for name in _KINDS[file.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        other = "" if file.suffix == ".html" else "; a file ending with .html needs no kaleido"
        raise ConfigError(f"--plot {file} needs what is not installed here: pip install {' '.join(missing)}{other}")


def write(figure: Mapping[str, Any], file: Path) -> None:
    """Write a figure of this module."""
    output = importlib.import_module("plotly.io")
    if file.suffix == ".html":
        output.write_html(figure, file, include_plotlyjs=True)
    else:
        output.write_image(figure, file)


def cycles(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first cycles of rows of `rows.row` as plotly's JSON: milliseconds by phase."""
    bars = [
        (f"{row['case']}, digests {'on' if row['digests'] else 'off'}", f"{name}, cycle {number}", phases)
        for row in rows
        for name, phases_of in row["cycles"].items()
        for number, phases in enumerate(phases_of, 1)
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


def packing(found: Sequence[Packing]) -> dict[str, Any]:
    """Rates by length of runs as plotly's JSON: two lines for each transport."""
    lines = [
        (f"{each.transport}, {way}", [(row.run_bytes, row.bytes / seconds(row) / 1e9) for row in each.rows])
        for each in found
        for way, seconds in _WAYS.items()
    ]
    return {
        "data": [
            {"type": "scatter", "name": name, "x": [x for x, _ in points], "y": [y for _, y in points]}
            for name, points in lines
        ],
        "layout": {
            "title": {"text": "Refits of runs of one length"},
            "xaxis": {"type": "log", "title": {"text": "bytes of a run"}},
            "yaxis": {"title": {"text": "GB/s"}},
        },
    }
