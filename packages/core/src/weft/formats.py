"""Formats: how the elements of a tensor lie, where that is not as on disk, and which formats a target accepts.

A kernel's own format (packed, permuted, swizzled) is known to engines and to nobody else. So a format is a name and
metadata, both text; weft moves such bytes between those who call them the same, and never converts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Format(msgspec.Struct, frozen=True, array_like=True):
    """What a tensor's elements are. Two formats are one when name and metadata are equal."""

    name: str
    """`checkpoint`, or an engine's own, such as `vllm-cpu-linear`."""
    metadata: dict[str, str] = {}
    """Whatever the bytes depend on besides: block sizes, instruction set, the engine's version."""

    def __hash__(self) -> int:
        return hash((self.name, *sorted(self.metadata.items())))

    def __str__(self) -> str:
        values = ", ".join(f"{key}={value}" for key, value in sorted(self.metadata.items()))
        return f"{self.name} ({values})" if values else self.name


CHECKPOINT = Format("checkpoint")
"""As on disk: every element is the logical tensor's."""


class Acceptance(msgspec.Struct, frozen=True, array_like=True):
    """A format that a target takes its tensors in, besides the one in which it declares each."""

    format: str
    metadata: dict[str, tuple[str, ...]] = {}
    """Per key, the values that will do; of none, any will. What has another key, or lacks one of these, is refused: it
    depends on something that the target does not know.
    """


def format_fault(format: Format) -> str | None:
    """What is wrong with a format by itself, or None."""
    if not format.name:
        return "a format needs a name"
    if format.name == CHECKPOINT.name and format.metadata:
        return f"format {format}: what is as on disk has no metadata; give the format a name of its own"
    return None


def refusal(offered: Format, own: Format, accepts: Sequence[Acceptance]) -> str:
    """Why a target that declares a tensor in the format `own`, and `accepts` others, cannot take it as it is offered.

    Lists every reason; empty when it can.
    """
    if offered == own:
        return ""
    exact = Acceptance(own.name, {key: (value,) for key, value in own.metadata.items()})
    accepted = [each for each in (exact, *accepts) if each.format == offered.name]
    if not accepted:
        return f"accepted: {', '.join(dict.fromkeys([own.name, *(each.format for each in accepts)]))}"
    reasons = [_metadata_faults(offered.metadata, each) for each in accepted]
    return "" if not all(reasons) else "; or ".join(", ".join(faults) for faults in reasons)


def _metadata_faults(offered: dict[str, str], accepted: Acceptance) -> list[str]:
    faults = []
    for key in sorted(offered.keys() | accepted.metadata.keys()):
        values = accepted.metadata.get(key)
        if values is None:
            faults.append(f"{key} is {offered[key]!r}, accepted without it")
        elif key not in offered:
            faults.append(f"{key} is missing, accepted: {' or '.join(map(repr, values)) or 'any'}")
        elif values and offered[key] not in values:
            faults.append(f"{key} is {offered[key]!r}, accepted: {' or '.join(map(repr, values))}")
    return faults
