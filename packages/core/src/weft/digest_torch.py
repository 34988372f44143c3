"""The sums of `weft.digest` over pieces of a device's memory in torch's operations, where Triton is not installed.

64-bit integers of torch are signed; products and sums wrap alike. The reference of `weft.digest_triton`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.digest import BLOCK, LANES, block_offset
from weft.digest_pieces import Piece

Units = Sequence[tuple[Piece, torch.Tensor]]
"""Pieces and their units, [rows, columns] of signed integers of `Piece.width` bytes."""

SIGNED = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_MOST = 1 << 20
"""Units handled at once: what is made of them on the way stays small."""


class TorchSums:
    """Both lanes of one bucket, computed in the current stream of its device."""

    def __init__(self, units: Units, table: torch.Tensor) -> None:
        """`table` is the key table of `weft.digest`, int64 [lanes, words of a block], on the device of the units."""
        self._units, self._table = units, table

    def __call__(self) -> torch.Tensor:
        """int64 [lanes], on the device."""
        total = torch.zeros(LANES, dtype=torch.int64, device=self._table.device)
        for piece, units in self._units:
            wide = min(piece.columns, _MOST)
            for row in range(0, piece.rows, most := max(1, _MOST // wide)):
                for column in range(0, piece.columns, wide):
                    total += self._sums(piece, units[row : row + most, column : column + wide], row, column)
        return total

    def _sums(self, piece: Piece, units: torch.Tensor, row: int, column: int) -> torch.Tensor:
        rows, columns = units.shape
        device = units.device
        i = torch.arange(row, row + rows, device=device)[:, None]
        j = torch.arange(column, column + columns, device=device)
        first = piece.position + i * piece.distance
        at = first + j // piece.parts * piece.step + j % piece.parts * piece.width
        values = units.to(torch.int64)
        if piece.width < 8:
            values = (values & ((1 << 8 * piece.width) - 1)) << at % 8 * 8
        word = at // 8
        block = (first if piece.in_block else at) // (8 * BLOCK)
        keys = [self._table[lane][word % BLOCK] * _block_keys(piece.seed, lane, block) for lane in range(LANES)]
        return torch.stack([(values * keys[0]).sum(), (_shifted(values, 32) * keys[1]).sum()])


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros coming in."""
    return values >> bits & (1 << 64 - bits) - 1


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Finalizer of splitmix64, as in `weft.digest`."""
    values = (values ^ _shifted(values, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    values = (values ^ _shifted(values, 27)) * (0x94D049BB133111EB - (1 << 64))
    return values ^ _shifted(values, 31)


def _block_keys(seed: int, lane: int, blocks: torch.Tensor) -> torch.Tensor:
    offset = block_offset(seed, lane)
    offset -= (offset >> 63) << 64
    return _mix(_mix(blocks + offset) + offset) | 1
