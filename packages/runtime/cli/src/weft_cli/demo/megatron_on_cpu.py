"""Megatron-Core on a machine without CUDA: the two calls that only CUDA answers, answered. Nothing else in weft does
this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker


def answer_cuda_calls() -> None:
    """Let this process run Megatron models on CPU. Call once, before a model is built; does nothing where CUDA is
    available.

    `models/common/embeddings/rotary_pos_embedding.py` asks for the current device;
    `transformer/dot_product_attention.py` forks the CUDA random state around dropout, which is 0 here.
    """
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    CudaRNGStatesTracker.fork = _no_fork


@contextmanager
def _no_fork(tracker: CudaRNGStatesTracker, name: str = "") -> Iterator[None]:
    yield
