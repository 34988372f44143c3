"""What `weft doctor` learns from this package: whether there is a Megatron-Core that weft knows."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from weft.diagnosis import Finding


def diagnose(root: Path) -> list[Finding]:
    """Imports Megatron-Core if there is one; without, layouts from a config alone still work."""
    fix = "pip install 'weft-megatron[megatron]'"
    if importlib.util.find_spec("megatron") is None:
        return [Finding("Megatron-Core", "note", "not installed: plans can be made for it, models cannot be sent", fix)]
    try:
        upstream = importlib.import_module("weft_megatron.upstream")
    except Exception as error:  # noqa: BLE001  # Megatron's import fails in many ways, and each is a finding
        return [Finding("Megatron-Core", "broken", f"{type(error).__name__}: {error}", fix)]
    version = upstream.megatron_core.__version__
    return [Finding("Megatron-Core", "ok", f"{version}: live models can be sent and received")]
