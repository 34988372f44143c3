"""What `weft doctor` learns from this package."""

from __future__ import annotations

from pathlib import Path

import torch

from weft.diagnosis import Finding
from weft.errors import WeftError
from weft_cudamalloc.native import OBJECT
from weft_cudamalloc.pools import Pool, inactive_reason


def diagnose(root: Path) -> list[Finding]:
    """Whether pools can be made on every CUDA device of this process; makes one on each."""
    if reason := inactive_reason():
        built = "is compiled" if OBJECT.is_file() else "was not compiled, which matters where there is CUDA"
        return [Finding("cudaMalloc pool", "note", f"does nothing here: {reason}; it {built}")]
    try:
        for index in range(torch.cuda.device_count()):
            Pool(index)
    except WeftError as error:
        return [Finding("cudaMalloc pool", "broken", str(error), "do what the message says")]
    return [Finding("cudaMalloc pool", "ok", f"gives memory on {torch.cuda.device_count()} CUDA devices")]
