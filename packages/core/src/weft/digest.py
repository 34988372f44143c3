"""Digests: a linear keyed sum over logical elements, modulo 2⁶⁴, in two lanes.

The digest of a set of elements is `Σ key(tensor, position) · bits`, where an element's key is the key of the 8-byte
word it falls into when the flattened tensor is laid out densely, shifted to its place in that word. The sum does not
depend on who holds which element, in which order or layout, so partial digests of buckets, ranks and replicas simply
add up. Keys are odd, so a single changed bit always shows. The high bits of a word meet the low bits of its key only,
so the second lane sums the upper halves of the words: what is weak in the first lane (an even number of changed signs,
say) is strong in the second. Not cryptographic.

The key of word w is `table[w mod 1024] · block(tensor, w div 1024)`: runs that lie at the same place of their blocks
reduce to one dot product with a table that stays in the processor's cache. Rows of a matrix fall into few such
classes, since their places repeat.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

LANES = 2
BLOCK = 1024
"""Words per block of keys."""
BLOCK_BYTES = 8 * BLOCK
_CHUNK = 128
"""Blocks handled at once: a megabyte, few calls, and still near the core for the second lane."""
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


def _block_keys(offsets: UInt64s, blocks: UInt64s) -> UInt64s:
    """The keys of blocks, of tensors and lanes that `offsets` (see `block_offset`) stand for."""
    return _mix(_mix(blocks + offsets) + offsets) | np.uint64(1)


def _offsets(seed: int) -> UInt64s:
    return np.array([block_offset(seed, lane) for lane in range(LANES)], dtype=np.uint64)


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
        return Sums([(memory, self)])()

    def elements(self, memory: Bytes) -> Digest:
        """The same, element by element: slow, and needs no whole words."""
        total = Digest()
        within = np.arange(self.length, dtype=np.int64) * self.stride
        most = max(1, _CHUNK * BLOCK // self.length)
        offsets = _offsets(self.seed)
        for offset, start in zip(self.offsets.tolist(), self.starts.tolist(), strict=True):
            for first in range(0, self.rows, most):
                index = np.arange(first, min(first + most, self.rows), dtype=np.int64)[:, None]
                data = memory[offset + index * self.row_bytes + np.arange(self.length * self.itemsize, dtype=np.int64)]
                values = data.view(f"<u{self.itemsize}").astype(np.uint64)
                at = (start + index * self.row_distance + within) * self.itemsize
                values <<= ((at % 8) * 8).astype(np.uint64)
                blocks, places = np.divmod(at // 8, BLOCK)
                lanes = [
                    int((part * (TABLE[lane][places] * _block_keys(offsets[lane], blocks.astype(np.uint64)))).sum())
                    for lane, part in enumerate((values, values >> np.uint64(32)))
                ]
                total += Digest((lanes[0], lanes[1]))
        return total


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows of whole words, all at `place` of their blocks: the first row's is `block`, and each next one `step`
    further.
    """

    words: UInt64s
    place: int
    block: int
    step: int
    seed: int


def strips(memory: Bytes, runs: Runs) -> Iterator[Strip | Runs]:
    """What these elements consist of: strips and, where they fill no whole words, runs to be taken one by one."""
    nbytes, distance = runs.length * runs.itemsize, runs.row_distance * runs.itemsize
    period = min(runs.rows, BLOCK_BYTES // math.gcd(distance, BLOCK_BYTES))
    step = period * distance // BLOCK_BYTES
    for offset, position in zip(runs.offsets.tolist(), (runs.starts * runs.itemsize).tolist(), strict=True):
        if runs.stride == 1 and 3 * runs.rows <= period * (nbytes // BLOCK_BYTES + 2):  # fewer strips this way
            for row in range(runs.rows):
                yield from _row(memory, runs, offset + row * runs.row_bytes, position + row * distance, nbytes)
        elif runs.stride != 1 or (nbytes | distance | position) % 8:
            yield _part(runs, offset, position, runs.rows, nbytes)
        else:
            for row in range(period):
                first, shift = position + row * distance, offset + row * runs.row_bytes
                rows = -(-(runs.rows - row) // period)
                for begin, end in pairwise(cuts(first, first + nbytes, (BLOCK_BYTES,))):
                    for low in range(begin, end, BLOCK_BYTES):
                        count = min(end - low, BLOCK_BYTES)
                        words = _words(memory, shift + low - first, rows, count, period * runs.row_bytes)
                        yield Strip(words, low // 8 % BLOCK, low // BLOCK_BYTES, step, runs.seed)


def _row(memory: Bytes, runs: Runs, offset: int, position: int, nbytes: int) -> Iterator[Strip | Runs]:
    """What is before its first whole word, the rest of that block, whole blocks, and likewise behind."""
    for begin, end in pairwise(cuts(position, position + nbytes, (8, BLOCK_BYTES))):
        at = offset + begin - position
        if begin % 8 or end % 8:
            yield _part(runs, at, begin, 1, end - begin)
        else:
            rows = max(1, (end - begin) // BLOCK_BYTES)
            words = _words(memory, at, rows, (end - begin) // rows, BLOCK_BYTES)
            yield Strip(words, begin // 8 % BLOCK, begin // BLOCK_BYTES, 1, runs.seed)


def _part(runs: Runs, offset: int, position: int, rows: int, nbytes: int) -> Runs:
    at, start = np.array([[offset], [position // runs.itemsize]], dtype=np.int64)
    return replace(runs, rows=rows, length=nbytes // runs.itemsize, offsets=at, starts=start)


def _words(memory: Bytes, offset: int, rows: int, nbytes: int, row_bytes: int) -> UInt64s:
    return np.ndarray((rows, nbytes // 8), "<u8", memory.data, offset, (row_bytes, 8))


def cuts(begin: int, end: int, units: tuple[int, ...]) -> list[int]:
    """`begin`, `end` and, per unit, its first and last multiple between them."""
    found = {begin, end}
    for unit in units:
        first, last = -(-begin // unit) * unit, end // unit * unit
        if first <= last:
            found |= {first, last}
    return sorted(found)


class Sums:
    """The digest of all these elements together, in numpy, of what their memories hold whenever it is called.

    A strip costs three calls of numpy's beside its bytes; the keys of all blocks are computed together.
    """

    def __init__(self, held: Sequence[tuple[Bytes, Runs]]) -> None:
        found = [(memory, each) for memory, runs in held for each in strips(memory, runs)]
        self._odd = [(memory, each) for memory, each in found if isinstance(each, Runs)]
        self._strips = [each for _, each in found if isinstance(each, Strip)]
        self._rows = np.array([len(each.words) for each in self._strips], dtype=np.int64)
        self._first = np.cumsum(self._rows) - self._rows
        self._block, self._step = (
            np.array([getattr(each, field) for each in self._strips], dtype=np.int64) for field in ("block", "step")
        )
        self._offsets = np.array([_offsets(each.seed) for each in self._strips], dtype=np.uint64).reshape(-1, LANES)

    def __call__(self) -> Digest:
        sums = np.empty((LANES, int(self._rows.sum())), dtype=np.uint64)
        for strip, first in zip(self._strips, self._first.tolist(), strict=True):
            _sum(strip, sums[:, first : first + len(strip.words)])
        index = np.arange(sums.shape[1]) - np.repeat(self._first, self._rows)
        blocks = np.repeat(self._block, self._rows) + index * np.repeat(self._step, self._rows)
        keys = _block_keys(np.repeat(self._offsets.T, self._rows, axis=1), blocks.astype(np.uint64))
        lanes = (sums * keys).sum(axis=1).tolist()
        return sum((runs.elements(memory) for memory, runs in self._odd), Digest((lanes[0], lanes[1])))


def _sum(strip: Strip, out: UInt64s) -> None:
    """Both lanes of every row, before they are multiplied by the keys of their blocks."""
    rows, length = strip.words.shape
    keys = TABLE[:, strip.place : strip.place + length]
    most = max(1, _CHUNK * BLOCK // length)
    for first in range(0, rows, most):
        part = strip.words[first : first + most]
        np.einsum("ij,j->i", part, keys[0], out=out[0, first : first + most])
        np.einsum("ij,j->i", part >> np.uint64(32), keys[1], out=out[1, first : first + most])


def digest_array(name: str, values: npt.NDArray[np.generic]) -> Digest:
    """The digest of a whole logical tensor: `values` is dense, in the dtype whose bits are to be summed."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    nest = Runs.of_nest(tensor_seed(name), values.itemsize, 0, 0, [values.size], [1], [1])
    return nest.digest(data) if values.size else Digest()
