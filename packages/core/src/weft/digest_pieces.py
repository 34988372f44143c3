"""Pieces: what digests of a device's memory are computed by. Matrices of equal words, or of parts of words.

A piece is read in the widest units that its places allow, in memory and in the words of the flattened tensor. Where
it costs little, runs are cut so that no row of a piece crosses a block of keys: then a row has one block key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from weft.digest import BLOCK_BYTES, Runs, cuts

_LEAST_BYTES = 2048
"""Of a piece, on average, when a matrix is cut into many: each has a row in tables on the device."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Unit j of row i is at byte `offset + i·row_bytes + j·width` of the memory and at byte
    `position + i·distance + (j div parts)·step + (j mod parts)·width` of the flattened tensor.
    """

    seed: int
    width: int
    """Bytes per unit: 1, 2, 4 or 8. Divides every other number of bytes."""
    offset: int
    rows: int
    columns: int
    row_bytes: int
    position: int
    distance: int
    parts: int
    step: int
    in_block: bool
    """Whether every row lies in one block."""


def pieces(runs: Runs, alignment: int) -> Iterator[Piece]:
    """Pieces that hold every element of `runs` once; byte 0 of the memory is aligned to `alignment` bytes."""
    nbytes, distance = runs.length * runs.itemsize, runs.row_distance * runs.itemsize
    for offset, start in zip(runs.offsets.tolist(), (runs.starts * runs.itemsize).tolist(), strict=True):
        if runs.stride != 1:
            yield _strided(runs, alignment, offset, start, distance)
        elif runs.rows == 1:
            yield from _dense(runs, alignment, offset, start, nbytes)
        else:
            yield from _rows(runs, alignment, offset, start, nbytes, distance)


def _matrix(
    runs: Runs, alignment: int, offset: int, position: int, rows: int, nbytes: int, row_bytes: int, distance: int
) -> Piece:
    """A piece of rows of `nbytes` that follow each other without gaps in the flattened tensor."""
    width = math.gcd(8, alignment, offset, position, nbytes, row_bytes * (rows > 1), distance * (rows > 1))
    columns, in_block = nbytes // width, _in_block(position, rows, nbytes, distance)
    return Piece(runs.seed, width, offset, rows, columns, row_bytes, position, distance, columns, 0, in_block)


def _strided(runs: Runs, alignment: int, offset: int, position: int, distance: int) -> Piece:
    """Elements that are not neighbours in the flattened tensor: no unit is wider than one of them."""
    width = math.gcd(runs.itemsize, alignment, offset, runs.row_bytes * (runs.rows > 1))
    parts, step = runs.itemsize // width, runs.stride * runs.itemsize
    in_block = _in_block(position, runs.rows, (runs.length - 1) * step + runs.itemsize, distance)
    return Piece(
        runs.seed, width, offset, runs.rows, runs.length * parts, runs.row_bytes, position, distance, parts, step,
        in_block,
    )  # fmt: skip


def _dense(runs: Runs, alignment: int, offset: int, position: int, nbytes: int) -> Iterator[Piece]:
    """A run: what is before its first whole word, the rest of that block, whole blocks as rows, and likewise behind."""
    for begin, end in pairwise(cuts(position, position + nbytes, (8, BLOCK_BYTES))):
        rows = max(1, (end - begin) // BLOCK_BYTES)
        at, width = offset + begin - position, (end - begin) // rows
        yield _matrix(runs, alignment, at, begin, rows, width, BLOCK_BYTES, BLOCK_BYTES)


def _rows(
    runs: Runs, alignment: int, offset: int, position: int, nbytes: int, distance: int
) -> Iterator[Piece]:  # fmt: skip
    """A matrix: rows whose places in their blocks are the same are cut alike, unless that makes too many pieces."""
    period = min(runs.rows, BLOCK_BYTES // math.gcd(distance, BLOCK_BYTES))
    strips = -(-nbytes // BLOCK_BYTES) + 1
    if _in_block(position, runs.rows, nbytes, distance) or runs.rows * nbytes < period * strips * _LEAST_BYTES:
        yield _matrix(runs, alignment, offset, position, runs.rows, nbytes, runs.row_bytes, distance)
        return
    for row in range(period):
        first, at = position + row * distance, offset + row * runs.row_bytes
        rows = -(-(runs.rows - row) // period)
        for begin, end in pairwise(cuts(first, first + nbytes, (BLOCK_BYTES,))):
            for low in range(begin, end, BLOCK_BYTES):
                count = min(end - low, BLOCK_BYTES)
                step = period * runs.row_bytes, period * distance
                yield _matrix(runs, alignment, at + low - first, low, rows, count, *step)


def _in_block(position: int, rows: int, nbytes: int, distance: int) -> bool:
    """Whether no row of `nbytes` crosses a block. Places in blocks repeat after `BLOCK_BYTES` rows at the latest."""
    first = position + np.arange(min(rows, BLOCK_BYTES), dtype=np.int64) * distance
    return bool((first % BLOCK_BYTES + nbytes <= BLOCK_BYTES).all())
