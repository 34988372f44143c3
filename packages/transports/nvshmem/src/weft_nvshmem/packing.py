"""Packing many pieces into a slot with one kernel, and unpacking them.

A table has one row per piece: its address, its offset in the slot and its length, all in elements of `width` bytes,
the widest that divides every number of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_WIDTHS = (8, 4, 2, 1)


def table_of(pieces: Sequence[torch.Tensor]) -> tuple[npt.NDArray[np.int64], int]:
    """Rows of (address in bytes, offset, length) and the width that offset and length are counted in."""
    lengths = np.array([piece.numel() for piece in pieces], np.int64)
    addresses = np.array([piece.data_ptr() for piece in pieces], np.int64)
    rows = np.stack([addresses, np.cumsum(lengths) - lengths, lengths], axis=1)
    width = next(width for width in _WIDTHS if not (rows % width).any())
    rows[:, 1:] //= width
    return rows, width
