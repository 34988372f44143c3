"""A vLLM plug-in for tests: expert parallelism on CPU. Put this folder on `PYTHONPATH` of whatever starts an engine.

vLLM's CPU kernel for unquantized experts (0.31 and 0.32, `fused_moe/experts/cpu_moe.py`) is handed the map from the
model's experts to those of this rank and ignores it: with `enable_expert_parallel=True` it reads beyond its weights and
crashes. Here the experts of a token are translated first; those of other ranks get weight 0.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


def register() -> None:
    """Entry point of group `vllm.general_plugins`: called in every process, in some of them more than once."""
    original = CPUUnquantizedExperts.apply
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def apply(self: Any, **given: Any) -> None:
        if given["expert_map"] is not None:
            local: torch.Tensor = given["expert_map"][given["topk_ids"].long()]
            given["topk_weights"] = given["topk_weights"] * (local >= 0)
            given["topk_ids"] = local.clamp(min=0).to(given["topk_ids"].dtype)
        original(self, **given)

    CPUUnquantizedExperts.apply = apply
