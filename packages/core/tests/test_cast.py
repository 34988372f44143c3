"""The encoding of core keeps the contract."""

from __future__ import annotations

import numpy as np
import torch

from weft.testing.encodings import EncodingSuite
from weft.views import byte_view


class TestCast(EncodingSuite):
    name = "cast"
    dtypes = (
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
    )

    def reference(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """By bit arithmetic for bfloat16, and numpy for the others."""
        bits = byte_view(source)
        if dtype == torch.bfloat16:
            word = bits.view(np.uint32).astype(np.uint64)
            nearest = (word + 0x7FFF + (word >> 16 & 1) >> 16).astype(np.uint16)
            quiet = np.where(np.isnan(bits.view(np.float32)), 0x7FC0, nearest).astype(np.uint16)
            return torch.from_numpy(quiet.view(np.int16)).view(dtype)
        if source.dtype == torch.bfloat16:
            return torch.from_numpy((bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
        with np.errstate(over="ignore"):
            return torch.from_numpy(source.numpy().astype(np.float16 if dtype == torch.float16 else np.float32))
