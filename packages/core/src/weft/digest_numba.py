"""The sums of `weft.digest` over the processor's memory in one compiled pass. Imports only where numba is installed.

numpy multiplies 64-bit integers one by one, and reads everything twice; compiled, one core sums nearly as fast as it
reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit

from weft.digest import BLOCK, LANES, TABLE, Bytes, Digest, Int64s, Runs, UInt64s, block_offset

_Held = tuple[Bytes, int, Int64s, UInt64s]
"""A storage, its address and, per matrix in it, its row for the kernel and the offsets of its tensor's block keys."""


class NumbaSums:
    """The digest of all these elements together, of what their memories hold whenever it is called."""

    def __init__(self, held: Sequence[tuple[torch.Tensor, Runs]]) -> None:
        """Compiles once in a process, which takes about a second."""
        rows: dict[int, list[list[int]]] = {}
        offsets: dict[int, list[list[int]]] = {}
        storages: dict[int, Bytes] = {}
        for memory, runs in held:
            storage = memory.untyped_storage()
            address, begin = storage.data_ptr(), memory.storage_offset() * memory.element_size()
            storages[address] = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            shape = [runs.rows, runs.length, runs.row_bytes, runs.row_distance, runs.itemsize, runs.stride]
            for offset, start in zip(runs.offsets.tolist(), runs.starts.tolist(), strict=True):
                rows.setdefault(address, []).append([begin + offset, start, *shape])
                offsets.setdefault(address, []).append([block_offset(runs.seed, lane) for lane in range(LANES)])
        self._parts: list[_Held] = [
            (storages[address], address, np.array(rows[address], np.int64), np.array(offsets[address], np.uint64))
            for address in storages
        ]
        _add(np.empty(0, np.uint8), 0, np.empty((0, 8), np.int64), np.empty((0, LANES), np.uint64), TABLE, _zeros())

    def __call__(self) -> Digest:
        sums = _zeros()
        for memory, address, matrices, offsets in self._parts:
            _add(memory, address, matrices, offsets, TABLE, sums)
        return Digest((int(sums[0]), int(sums[1])))


def _zeros() -> UInt64s:
    return np.zeros(LANES, dtype=np.uint64)


_27, _30, _31, _32 = (np.uint64(bits) for bits in (27, 30, 31, 32))


# Helpers are inlined by LLVM. Every literal has its type: numba makes floats of signed and unsigned 64-bit integers.
@njit
def _mix(value):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> _30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _27)) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> _31)


@njit
def _block_key(block, offset):  # type: ignore[no-untyped-def]
    return _mix(_mix(np.uint64(block) + offset) + offset) | np.uint64(1)


@njit
def _words(words, word, offsets, table, sums):  # type: ignore[no-untyped-def]
    """Whole words, the first of which is word `word` of its tensor."""
    done = 0
    while done < len(words):
        block, place = divmod(word + done, BLOCK)
        count = min(BLOCK - place, len(words) - done)
        part, first_keys, second_keys = words[done : done + count], table[0, place:], table[1, place:]
        first, second = np.uint64(0), np.uint64(0)
        for n in range(count):
            first += part[n] * first_keys[n]
            second += (part[n] >> _32) * second_keys[n]
        sums[0] += first * _block_key(block, offsets[0])
        sums[1] += second * _block_key(block, offsets[1])
        done += count


@njit
def _elements(memory, offset, start, length, itemsize, stride, offsets, table, sums):  # type: ignore[no-untyped-def]
    """Elements that are no whole words, each `stride` behind the one before in its tensor."""
    last = np.int64(-1)
    keys = (np.uint64(0), np.uint64(0))
    for n in range(length):
        at = (start + n * stride) * itemsize
        bits = np.uint64(0)
        for byte in range(itemsize):
            bits |= np.uint64(memory[offset + n * itemsize + byte]) << np.uint64(8 * (at % 8 + byte))
        block, place = divmod(at // 8, BLOCK)
        if block != last:
            last, keys = block, (_block_key(block, offsets[0]), _block_key(block, offsets[1]))
        sums[0] += bits * (table[0, place] * keys[0])
        sums[1] += (bits >> _32) * (table[1, place] * keys[1])


@njit(nogil=True)
def _add(memory, address, matrices, offsets, table, sums):  # type: ignore[no-untyped-def]
    """Add both lanes of matrices in `memory`, which begins at `address`. A row of `matrices` has its byte offset, then
    its first element, rows, elements per row, bytes and elements from row to row, bytes per element, and stride.
    """
    for n in range(len(matrices)):
        itemsize, stride, length = matrices[n, 6], matrices[n, 7], matrices[n, 3]
        for row in range(matrices[n, 2]):
            offset, start = matrices[n, 0] + row * matrices[n, 4], matrices[n, 1] + row * matrices[n, 5]
            position = start * itemsize
            before, words = length, 0
            if stride == 1 and (address + offset - position) % 8 == 0:
                before = min(length, -position % 8 // itemsize)
                words = (length - before) * itemsize // 8
            at, after = offset + before * itemsize, before + words * 8 // itemsize
            _elements(memory, offset, start, before, itemsize, stride, offsets[n], table, sums)
            if words:
                aligned = memory[at : at + words * 8].view(np.uint64)
                _words(aligned, (start + before) * itemsize // 8, offsets[n], table, sums)
            _elements(memory, at + words * 8, start + after, length - after, itemsize, stride, offsets[n], table, sums)
