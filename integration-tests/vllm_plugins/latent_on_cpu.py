"""A vLLM plug-in for tests: multi-latent attention on CPU. Put this folder on `PYTHONPATH` of what starts an engine.

vLLM's CPU kernels for norms and for rotary positions of alternating columns (0.32) take strided views, which this
attention gives them, for dense memory: even the first token differs from one run to the next, with or without weft.
Here norms get dense copies, and such positions are computed by vLLM's own code in torch. Tokens after the first, which
another kernel decodes, still differ from Transformers'.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def register() -> None:
    """Entry point of group `vllm.general_plugins`: called in every process, in some of them more than once."""
    norm, rotate = RMSNorm.forward_cpu, RotaryEmbedding.forward_cpu
    if hasattr(norm, "__wrapped__"):
        return

    @wraps(norm)
    def dense_norm(self: Any, x: torch.Tensor, *more: Any) -> Any:
        return norm(self, x.contiguous(), *more)

    @wraps(rotate)
    def dense_rotate(self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        if self.is_neox_style:
            return rotate(self, positions, query, key)
        return self.forward_native(positions, query.contiguous(), None if key is None else key.contiguous())

    RMSNorm.forward_cpu, RotaryEmbedding.forward_cpu = dense_norm, dense_rotate
