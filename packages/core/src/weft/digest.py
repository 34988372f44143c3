"""Digests: a linear keyed sum over logical elements, modulo 2⁶⁴, in two lanes.

The digest of a set of elements is `Σ key(tensor, position) · bits`, where an element's key is the key of the 8-byte
word it falls into when the flattened tensor is laid out densely, shifted to its place in that word. The sum does not
depend on who holds which element, in which order or layout, so partial digests of buckets, ranks and replicas simply
add up. Keys are odd, so a single changed bit always shows. The high bits of a word meet the low bits of its key only,
so the second lane reads the bytes of every word in reverse: what is weak in one lane (an even number of changed signs,
say) is strong in the other. Not cryptographic.

The key of word w is `table[w mod 1024] · block(tensor, w div 1024)`: whole blocks reduce to one dot product with a
table that stays in the processor's cache, which is what makes the sum as fast as memory.
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

_LANES = 2
_BLOCK = 1024
"""Words per block."""
_CHUNK = 128
"""Blocks handled at once: one megabyte, few calls and still near the core."""
_LONG_RUN_BYTES = 64 * 1024
"""Runs at least this long are worth a dot product of their own."""
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


_TABLE: UInt64s = _mix(np.arange(1, _LANES * _BLOCK + 1, dtype=np.uint64).reshape(_LANES, _BLOCK)) | np.uint64(1)


def tensor_seed(name: str) -> int:
    """64 bits that stand for a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _block_keys(seed: int, lane: int, blocks: UInt64s) -> UInt64s:
    offset = np.uint64((seed + (lane + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return _mix(_mix(blocks + offset) + offset) | np.uint64(1)


@dataclass(frozen=True, slots=True)
class Runs:
    """Where the elements of one copy lie in memory and in their logical tensor: equal runs at given starts.

    Element j of run i is at byte `offsets[i] + j·itemsize` of the memory and at `starts[i] + j·stride` of the
    flattened tensor.
    """

    seed: int
    itemsize: int
    length: int
    """Elements per run."""
    stride: int
    """Logical distance of neighbours in a run; 1 as a rule."""
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
        offsets = np.array([memory_offset], dtype=np.int64)
        starts = np.array([logical_start], dtype=np.int64)
        for size, step, distance in joined:
            index = np.arange(size, dtype=np.int64)
            offsets = (offsets[:, None] + index * (step * itemsize)).ravel()
            starts = (starts[:, None] + index * distance).ravel()
        return cls(seed, itemsize, length, stride, offsets, starts)

    def digest(self, memory: Bytes) -> Digest:
        """The digest of these elements in `memory`, a dense array of bytes."""
        nbytes = self.length * self.itemsize
        if self.stride != 1 or (nbytes < _LONG_RUN_BYTES and len(self.offsets) > 1):
            return self._scattered(memory)
        total = Digest()
        for offset, start in zip(self.offsets.tolist(), self.starts.tolist(), strict=True):
            total += _dense(memory[offset : offset + nbytes], start * self.itemsize, self.seed)
        return total

    def _scattered(self, memory: Bytes) -> Digest:
        """Many short runs at once."""
        nbytes = self.length * self.itemsize
        positions = self.starts * self.itemsize
        if self.stride == 1 and nbytes % 8 == 0 and not (positions % 8).any():
            return self._aligned(memory, positions // 8, nbytes // 8)
        total = Digest()
        within = np.arange(self.length, dtype=np.int64)
        rows = max(1, _CHUNK * _BLOCK // self.length)
        for first in range(0, len(self.offsets), rows):
            part = slice(first, first + rows)
            data = memory[self.offsets[part, None] + np.arange(nbytes, dtype=np.int64)]
            values = data.view(f"<u{self.itemsize}").astype(np.uint64)
            at = positions[part, None] + within * (self.stride * self.itemsize)
            values <<= ((at % 8) * 8).astype(np.uint64)
            blocks, places = np.divmod(at // 8, _BLOCK)
            lanes = [
                int((words * (_TABLE[lane][places] * _block_keys(self.seed, lane, blocks.astype(np.uint64)))).sum())
                for lane, words in enumerate((values, values.byteswap()))
            ]
            total += Digest((lanes[0], lanes[1]))
        return total

    def _aligned(self, memory: Bytes, words: Int64s, per_run: int) -> Digest:
        """Runs of whole words: those that start at the same place of a block share their dot products."""
        total = [0, 0]
        order = np.argsort(words % _BLOCK, kind="stable")
        phases, starts = np.unique(words[order] % _BLOCK, return_index=True)
        ends = [*starts[1:].tolist(), len(order)]
        most = max(1, _CHUNK * _BLOCK // per_run)
        for phase, begin, end in zip(phases.tolist(), starts.tolist(), ends, strict=True):
            for first in range(begin, end, most):
                runs = order[first : min(first + most, end)]
                data = np.stack([memory[o : o + per_run * 8] for o in self.offsets[runs].tolist()]).view("<u8")
                ways = (data, data.byteswap())
                at, inside, block = 0, phase, (words[runs] // _BLOCK).astype(np.uint64)
                while at < per_run:
                    count = min(_BLOCK - inside, per_run - at)
                    for lane, way in enumerate(ways):
                        key = _TABLE[lane][inside : inside + count]
                        sums = np.einsum("ij,j->i", way[:, at : at + count], key)
                        total[lane] += int((sums * _block_keys(self.seed, lane, block)).sum())
                    at, inside, block = at + count, 0, block + np.uint64(1)
        return Digest((total[0] & _MASK, total[1] & _MASK))


def _dense(data: Bytes, position: int, seed: int) -> Digest:
    """A run whose first byte is byte `position` of the flattened tensor."""
    lead = position % 8
    if lead or len(data) % 8:
        padded = np.zeros(-(-(lead + len(data)) // 8) * 8, dtype=np.uint8)
        padded[lead : lead + len(data)] = data
        data = padded
    words = data.view("<u8")
    first = position // 8
    total = [0, 0]
    at = 0
    while at < len(words):
        block, inside = divmod(first + at, _BLOCK)
        if inside or len(words) - at < _BLOCK:
            count = min(_BLOCK - inside, len(words) - at)
            rows, columns = words[at : at + count].reshape(1, count), slice(inside, inside + count)
        else:
            count = min(_CHUNK, (len(words) - at) // _BLOCK) * _BLOCK
            rows, columns = words[at : at + count].reshape(-1, _BLOCK), slice(0, _BLOCK)
        blocks = np.arange(block, block + len(rows), dtype=np.uint64)
        for lane, way in enumerate((rows, rows.byteswap())):
            sums = np.einsum("ij,j->i", way, _TABLE[lane][columns])
            total[lane] += int((sums * _block_keys(seed, lane, blocks)).sum())
        at += count
    return Digest((total[0] & _MASK, total[1] & _MASK))


def digest_array(name: str, values: npt.NDArray[np.generic]) -> Digest:
    """The digest of a whole logical tensor: `values` is dense, in the dtype whose bits are to be summed."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return _dense(data, 0, tensor_seed(name)) if math.prod(values.shape) else Digest()
