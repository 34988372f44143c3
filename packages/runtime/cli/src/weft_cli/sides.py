"""Parallel sizes as people write them: `megatron:tp2,pp2`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from weft.errors import ConfigError

_FORM = "framework:axisN,axisM, such as megatron:tp2,pp2"
_SIZE = re.compile(r"([a-z]+)=?([0-9]+)")


@dataclass(frozen=True, slots=True)
class Side:
    """A framework and its parallel sizes, by the framework's own flag names."""

    framework: str
    """Name of a plug-in of the group `weft.adapters`."""
    parallel: Mapping[str, int]
    """Size per axis that was given."""


def parse_side(text: str) -> Side:
    """Read `framework`, `framework:tp2,pp2` or `framework:tp=2,pp=2`.

    Raises `ConfigError` with every fault: sizes that are not numbers above zero, and axes given twice. Whether the
    framework has such axes is for `check_axes` to say, whether the sizes factor is for the adapter's `world_size`.
    """
    framework, _, sizes = text.strip().partition(":")
    faults: list[str] = []
    parallel: dict[str, int] = {}
    if not framework:
        faults.append("no framework is named")
    for part in filter(None, (piece.strip() for piece in sizes.split(","))):
        match = _SIZE.fullmatch(part)
        if match is None or int(match[2]) < 1:
            faults.append(f"{part!r} is not an axis with a size of at least 1")
        elif match[1] in parallel:
            faults.append(f"axis {match[1]} is given twice")
        else:
            parallel[match[1]] = int(match[2])
    if faults:
        raise ConfigError(f"{text!r}: {'; '.join(faults)}; expected {_FORM}")
    return Side(framework, parallel)


def check_axes(side: Side, axes: tuple[str, ...]) -> None:
    """Raise `ConfigError` for axes that the framework does not have, with the nearest one that it has."""
    faults = []
    for axis in side.parallel:
        if axis not in axes:
            near = difflib.get_close_matches(axis, axes, n=1, cutoff=0.3)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            faults.append(f"{side.framework} has no axis {axis!r}{hint}")
    if faults:
        raise ConfigError(f"{'; '.join(faults)}; its axes are {', '.join(axes)}")
