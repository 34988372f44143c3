"""Which series of vLLM weft-vllm drives. Importing it needs no vLLM: a server's may be on another machine."""

from __future__ import annotations

from dataclasses import dataclass

from weft.errors import PluginError

TESTED_SERIES = ("0.31", "0.32")
UNTESTED_SERIES = ("0.33",)
"""Neighbours with the same surfaces: accepted, and reported as untested."""


@dataclass(frozen=True, slots=True)
class Support:
    """Which vLLM this is, and how well weft knows it."""

    version: str
    tested: bool


def check(version: str) -> Support:
    """Accept a version of vLLM. Raises `PluginError` for a series that weft does not know; untested neighbours are
    accepted.
    """
    series = ".".join(version.split(".")[:2])
    if series not in (*TESTED_SERIES, *UNTESTED_SERIES):
        raise PluginError(
            f"vLLM {version} is installed; this weft-vllm is tested with {', '.join(TESTED_SERIES)} and accepts "
            f"{', '.join(UNTESTED_SERIES)} untested. Install vllm>=0.31,<0.33, or a weft-vllm made for {series}"
        )
    return Support(version, series in TESTED_SERIES)
