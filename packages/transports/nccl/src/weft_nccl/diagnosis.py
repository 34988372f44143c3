"""What `weft doctor` learns from this package: whether NCCL is here and new enough."""

from __future__ import annotations

from pathlib import Path

import torch

from weft.diagnosis import Finding
from weft.errors import ConfigError
from weft_nccl.library import load
from weft_nccl.options import NcclOptions


def diagnose(root: Path) -> list[Finding]:
    """Makes no communicator."""
    if not torch.cuda.is_available():
        words = "no CUDA device here: only the option backend='gloo' works, for tests"
        return [Finding("NCCL", "note", words, "use transport 'gloo' or 'nixl'")]
    try:
        version = load(NcclOptions().library).version()
    except ConfigError as error:
        return [Finding("NCCL", "broken", str(error), "do what the message says")]
    words = f"{version // 10_000}.{version // 100 % 100}.{version % 100}; weft's calls into it have never run on a GPU"
    return [Finding("NCCL", "note", words, "compare what arrives")]
