"""Digests: a linear keyed sum over logical elements, modulo 2⁶⁴, in two lanes.

The digest of a set of elements is `Σ key(tensor, position) · bits`, where an element's key is the key of the 8-byte
word it falls into when the flattened tensor is laid out densely, shifted to its place in that word. The sum does not
depend on who holds which element, in which order or layout, so partial digests of buckets, ranks and replicas simply
add up. Keys are odd, so a single changed bit always shows. The high bits of a word meet the low bits of its key only,
so the second lane sums the upper halves of the words: what is weak in the first lane (an even number of changed signs,
say) is strong in the second. Not cryptographic.

The key of word w is `table[w mod 1024] · block(tensor, w div 1024)`: runs that lie at the same place of their blocks
reduce to one dot product with a table that stays in the processor's cache, which is what makes the sum as fast as
memory. Rows of a matrix fall into few such classes, since their places repeat.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

LANES = 2
BLOCK = 1024
"""Words per block of keys."""
_CHUNK = 64
"""Blocks handled at once: half a megabyte, few calls, and still near the core for the second lane."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Digest:
    """Two sums modulo 2⁶⁴."""

    lanes: tuple[int, int] = (0, 0)

    def __add__(self, other: Digest) -> Digest:
        first, second = ((a + b) & _MASK for a, b in zip(self.lanes, other.lanes, strict=True))
        return Digest((first, second))

    def hex(self) -> str:
        """32 hexadecimal digits."""
        return "".join(f"{lane:016x}" for lane in self.lanes)

    @classmethod
    def from_hex(cls, text: str) -> Digest:
        """Inverse of `hex`. Raises `ValueError`."""
        if len(text) != 32:
            raise ValueError(f"a digest has 32 hexadecimal digits, not {len(text)}")
        return cls((int(text[:16], 16), int(text[16:], 16)))


def _mix(values: UInt64s) -> UInt64s:
    """Finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


TABLE: UInt64s = _mix(np.arange(1, LANES * BLOCK + 1, dtype=np.uint64).reshape(LANES, BLOCK)) | np.uint64(1)
"""[lanes, words of a block]."""


def tensor_seed(name: str) -> int:
    """64 bits that stand for a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def block_offset(seed: int, lane: int) -> int:
    """What block keys of a tensor are mixed with in a lane: 64 bits."""
    return (seed + (lane + 1) * 0x9E3779B97F4A7C15) & _MASK


def _block_keys(seed: int, lane: int, blocks: UInt64s) -> UInt64s:
    offset = np.uint64(block_offset(seed, lane))
    return _mix(_mix(blocks + offset) + offset) | np.uint64(1)


@dataclass(frozen=True, slots=True)
class Runs:
    """Where the elements of one copy lie in memory and in their logical tensor: matrices of equal shape.

    Element j of row i of matrix m is at byte `offsets[m] + i·row_bytes + j·itemsize` of the memory and at
    `starts[m] + i·row_distance + j·stride` of the flattened tensor.
    """

    seed: int
    itemsize: int
    rows: int
    """Rows per matrix."""
    length: int
    """Elements per row."""
    row_bytes: int
    row_distance: int
    stride: int
    """Logical distance of neighbours in a row; 1 as a rule."""
    offsets: Int64s
    starts: Int64s

    @classmethod
    def of_nest(
        cls,
        seed: int,
        itemsize: int,
        memory_offset: int,
        logical_start: int,
        sizes: Sequence[int],
        memory_strides: Sequence[int],
        logical_strides: Sequence[int],
    ) -> Runs:
        """From a loop nest with strides in elements and `memory_offset` in bytes."""
        axes = [a for a in zip(sizes, memory_strides, logical_strides, strict=True) if a[0] > 1]
        joined: list[tuple[int, int, int]] = []
        for size, step, distance in axes:
            if joined and joined[-1][1] == step * size and joined[-1][2] == distance * size:
                joined[-1] = (joined[-1][0] * size, step, distance)
            else:
                joined.append((size, step, distance))
        length, stride = 1, 1
        if joined and joined[-1][1] == 1:
            length, _, stride = joined.pop()
        most = max(range(len(joined)), key=lambda axis: joined[axis][0], default=None)
        rows, row_step, row_distance = (1, 0, 0) if most is None else joined.pop(most)
        offsets = np.array([memory_offset], dtype=np.int64)
        starts = np.array([logical_start], dtype=np.int64)
        for size, step, distance in joined:
            index = np.arange(size, dtype=np.int64)
            offsets = (offsets[:, None] + index * (step * itemsize)).ravel()
            starts = (starts[:, None] + index * distance).ravel()
        return cls(seed, itemsize, rows, length, row_step * itemsize, row_distance, stride, offsets, starts)

    def digest(self, memory: Bytes) -> Digest:
        """The digest of these elements in `memory`, a dense array of bytes."""
        nbytes, distance = self.length * self.itemsize, self.row_distance * self.itemsize
        in_words = self.stride == 1 and not (nbytes % 8 or distance % 8 or (self.starts * self.itemsize % 8).any())
        total = Digest()
        for offset, start in zip(self.offsets.tolist(), self.starts.tolist(), strict=True):
            if self.stride == 1 and self.rows == 1:
                total += _dense(memory[offset : offset + nbytes], start * self.itemsize, self.seed)
            elif in_words:
                words = np.ndarray((self.rows, nbytes // 8), "<u8", memory.data, offset, (self.row_bytes, 8))
                total += _matrix(words, start * self.itemsize // 8, distance // 8, self.seed)
            else:
                total += self._elements(memory, offset, start)
        return total

    def _elements(self, memory: Bytes, offset: int, start: int) -> Digest:
        """A matrix whose rows do not consist of whole words, element by element."""
        total = Digest()
        within = np.arange(self.length, dtype=np.int64) * self.stride
        most = max(1, _CHUNK * BLOCK // self.length)
        for first in range(0, self.rows, most):
            index = np.arange(first, min(first + most, self.rows), dtype=np.int64)[:, None]
            data = memory[offset + index * self.row_bytes + np.arange(self.length * self.itemsize, dtype=np.int64)]
            values = data.view(f"<u{self.itemsize}").astype(np.uint64)
            at = (start + index * self.row_distance + within) * self.itemsize
            values <<= ((at % 8) * 8).astype(np.uint64)
            blocks, places = np.divmod(at // 8, BLOCK)
            lanes = [
                int((part * (TABLE[lane][places] * _block_keys(self.seed, lane, blocks.astype(np.uint64)))).sum())
                for lane, part in enumerate((values, values >> np.uint64(32)))
            ]
            total += Digest((lanes[0], lanes[1]))
        return total


def _matrix(words: UInt64s, first: int, distance: int, seed: int) -> Digest:
    """Rows of words, each beginning `distance` words after the one before; the first at word `first` of its tensor."""
    rows, length = words.shape
    period = BLOCK // math.gcd(distance, BLOCK)
    total = Digest()
    for row in range(min(period, rows)):
        alike = words[row::period]
        block, place = divmod(first + row * distance, BLOCK)
        step, at = period * distance // BLOCK, 0
        while at < length:
            count = min(BLOCK - place, length - at)
            total += _sums(alike[:, at : at + count], place, block, step, seed)
            at, place, block = at + count, 0, block + 1
    return total


def _dense(data: Bytes, position: int, seed: int) -> Digest:
    """A run whose first byte is byte `position` of the flattened tensor."""
    lead = position % 8
    if lead or len(data) % 8:
        padded = np.zeros(-(-(lead + len(data)) // 8) * 8, dtype=np.uint8)
        padded[lead : lead + len(data)] = data
        data = padded
    words = data.view("<u8")
    first, total, at = position // 8, Digest(), 0
    while at < len(words):
        block, place = divmod(first + at, BLOCK)
        left = len(words) - at
        count = left - left % BLOCK if place == 0 and left >= BLOCK else min(BLOCK - place, left)
        total += _sums(words[at : at + count].reshape(-1, min(count, BLOCK)), place, block, 1, seed)
        at += count
    return total


def _sums(words: UInt64s, place: int, block: int, step: int, seed: int) -> Digest:
    """Rows of words, all at `place` of their block; the first row's is `block`, and each next one `step` further."""
    rows, length = words.shape
    sums = np.empty((LANES, rows), dtype=np.uint64)
    most = max(1, _CHUNK * BLOCK // length)
    for first in range(0, rows, most):
        part = words[first : first + most]
        halves = part.view("<u4")[:, 1::2]  # little-endian: the upper ones
        for lane, values in enumerate((part, halves)):
            np.einsum("ij,j->i", values, TABLE[lane, place : place + length], out=sums[lane, first : first + most])
    blocks = np.uint64(block) + np.arange(rows, dtype=np.uint64) * np.uint64(step)
    lanes = [int((sums[lane] * _block_keys(seed, lane, blocks)).sum()) for lane in range(LANES)]
    return Digest((lanes[0], lanes[1]))


def digest_array(name: str, values: npt.NDArray[np.generic]) -> Digest:
    """The digest of a whole logical tensor: `values` is dense, in the dtype whose bits are to be summed."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return _dense(data, 0, tensor_seed(name)) if math.prod(values.shape) else Digest()
