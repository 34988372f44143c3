"""The sums of `weft.digest` over pieces of a device's memory, in Triton. Imports only where Triton is installed.

Unproven on GPUs: it has run in Triton's interpreter, and been compiled for them.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
import triton
import triton.language as tl

from weft.digest import BLOCK, LANES, block_offset
from weft.digest_pieces import Piece
from weft.digest_torch import Units

_UNIT_TYPES = {8: tl.uint64, 4: tl.uint32, 2: tl.uint16, 1: tl.uint8}
_COLUMNS = (16, 64, 256, 1024)
"""Columns of a program's matrix: kernels are made per width and number of columns, so there are few."""
_UNITS = 1024
"""Units of a program's matrix."""
_STEPS = 16
"""Matrices, one below the other, that a program sums at most."""


# Parameters of kernels have no annotations but constexpr: Triton's compiler, unlike its interpreter, looks them up.
@triton.jit
def _mix(b_value):  # type: ignore[no-untyped-def]
    b_value = (b_value ^ (b_value >> 30)) * 0xBF58476D1CE4E5B9
    b_value = (b_value ^ (b_value >> 27)) * 0x94D049BB133111EB
    return b_value ^ (b_value >> 31)


@triton.jit  # type: ignore[untyped-decorator]
def _sum(  # type: ignore[no-untyped-def]
    p_tiles, p_pieces, p_table, p_sums, UNIT: tl.constexpr, WIDTH: tl.constexpr, IN_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # p_tiles: [tiles, 3] int64, p_pieces: [pieces, 10] int64, p_table: [2, 1024] int64, p_sums: [tiles, 2] int64
    p_tile = p_tiles + 3 * tl.program_id(0)
    p_piece = p_pieces + 10 * tl.load(p_tile)
    p_memory = tl.load(p_piece).to(tl.pointer_type(UNIT))
    row_units, rows, columns = tl.load(p_piece + 1), tl.load(p_piece + 2), tl.load(p_piece + 3)
    position, distance = tl.load(p_piece + 4), tl.load(p_piece + 5)
    parts, step = tl.load(p_piece + 6), tl.load(p_piece + 7)
    first_offset, second_offset = tl.load(p_piece + 8).to(tl.uint64), tl.load(p_piece + 9).to(tl.uint64)
    i_column = (tl.load(p_tile + 2) + tl.arange(0, COLUMNS))[None, :]
    b_within = i_column // parts * step + i_column % parts * WIDTH
    first = tl.zeros((ROWS, COLUMNS), tl.uint64)
    second = tl.zeros((ROWS, COLUMNS), tl.uint64)
    start = tl.load(p_tile + 1)
    for first_row in range(start, tl.minimum(rows, start + STEPS * ROWS), ROWS):
        i_row = (first_row + tl.arange(0, ROWS))[:, None]
        m_unit = (i_row < rows) & (i_column < columns)
        b_value = tl.load(p_memory + (i_row * row_units + i_column), mask=m_unit, other=0).to(tl.uint64)
        b_begin = position + i_row * distance
        b_at = b_begin + b_within
        if WIDTH < 8:
            b_value = b_value << ((b_at & 7) << 3).to(tl.uint64)
        p_key = p_table + ((b_at >> 3) & (BLOCK - 1))
        b_block = (b_begin // (8 * BLOCK)).to(tl.uint64) if IN_BLOCK else (b_at // (8 * BLOCK)).to(tl.uint64)
        b_first = _mix(_mix(b_block + first_offset) + first_offset) | 1
        b_second = _mix(_mix(b_block + second_offset) + second_offset) | 1
        first += b_value * (tl.load(p_key).to(tl.uint64) * b_first)
        second += (b_value >> 32) * (tl.load(p_key + BLOCK).to(tl.uint64) * b_second)
    p_sum = p_sums + 2 * tl.program_id(0)
    tl.store(p_sum, tl.sum(first).to(tl.int64))
    tl.store(p_sum + 1, tl.sum(second).to(tl.int64))


class TritonSums:
    """Both lanes of one bucket, computed in the current stream of the current device, which must be the bucket's.

    The tables of pieces and tiles stay on the device, some 30 bytes per 128 KiB of a long run.
    """

    def __init__(self, units: Units, table: torch.Tensor) -> None:
        """`table` is the key table of `weft.digest`, int64 [lanes, words of a block], on the device of the units."""
        self._table = table
        rows = np.array([_row(piece, memory) for piece, memory in units], dtype=np.int64)
        self._pieces = torch.from_numpy(rows).to(table.device)
        kinds: defaultdict[tuple[int, int, bool], list[list[int]]] = defaultdict(list)
        for number, (piece, _) in enumerate(units):
            wide = next((columns for columns in _COLUMNS if piece.columns <= columns), _COLUMNS[-1])
            starts = (range(0, piece.rows, _STEPS * _UNITS // wide), range(0, piece.columns, wide))
            kinds[piece.width, wide, piece.in_block] += [[number, i, j] for i in starts[0] for j in starts[1]]
        self._sums = self._pieces.new_empty((sum(map(len, kinds.values())), LANES))
        parts = self._sums.split([len(tiles) for tiles in kinds.values()])
        self._launches = [
            (*kind, torch.tensor(tiles, device=table.device), sums)
            for (kind, tiles), sums in zip(kinds.items(), parts, strict=True)
        ]
        self()  # compiles and loads the kernels, which no refit shall wait for

    def __call__(self) -> torch.Tensor:
        """int64 [lanes], on the device."""
        for width, wide, in_block, tiles, sums in self._launches:
            _sum[len(tiles),](
                tiles, self._pieces, self._table, sums, UNIT=_UNIT_TYPES[width], WIDTH=width, IN_BLOCK=in_block,
                ROWS=_UNITS // wide, COLUMNS=wide, STEPS=_STEPS, BLOCK=BLOCK,
            )  # fmt: skip
        return self._sums.sum(0)


def _row(piece: Piece, memory: torch.Tensor) -> list[int]:
    """What the kernel knows of a piece."""
    offsets = [block_offset(piece.seed, lane) for lane in range(LANES)]
    return [
        memory.data_ptr(), piece.row_bytes // piece.width, piece.rows, piece.columns, piece.position, piece.distance,
        piece.parts, piece.step, *(offset - ((offset >> 63) << 64) for offset in offsets),
    ]  # fmt: skip
