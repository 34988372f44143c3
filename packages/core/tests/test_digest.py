"""Digests do not depend on layout, order or division, and change with every bit, place and omission."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.box import row_major
from weft.digest import BLOCK, TABLE, Digest, Runs, Sums, _block_keys, block_offset, digest_array, tensor_seed

Words = npt.NDArray[np.uint64]
MASK = (1 << 64) - 1
ITEMSIZES = st.sampled_from([1, 2, 4, 8])


def naive(name: str, values: npt.NDArray[np.unsignedinteger], positions: list[int]) -> Digest:
    """The definition, element by element, in Python's integers."""
    width, lanes = values.itemsize, [0, 0]
    for value, position in zip(values.tolist(), positions, strict=True):
        word, byte = divmod(position * width, 8)
        for lane in (0, 1):
            block, offset = np.array([[word // BLOCK], [block_offset(tensor_seed(name), lane)]], dtype=np.uint64)
            key = int(TABLE[lane][word % BLOCK]) * int(_block_keys(offset, block)[0])
            bits = value << 8 * byte
            lanes[lane] = (lanes[lane] + key * (bits >> 32 if lane else bits)) & MASK
    return Digest((lanes[0], lanes[1]))


def bits(random: Random, shape: tuple[int, ...], itemsize: int) -> npt.NDArray[np.unsignedinteger]:
    """Values that hypothesis does not shrink: it chooses shapes and places."""
    count = int(np.prod(shape)) * itemsize
    generator = np.random.default_rng(random.randrange(1 << 32))
    return generator.integers(0, 256, count, dtype=np.uint8).view(f"<u{itemsize}").reshape(shape)


@settings(deadline=None)
@given(
    st.randoms(use_true_random=False), ITEMSIZES, st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(0, 5000), st.integers(0, 40),
)  # fmt: skip
def test_any_nest_gives_the_digest_of_its_elements(
    random: Random, itemsize: int, sizes: list[int], start: int, offset: int
) -> None:
    order = random.sample(range(len(sizes)), len(sizes))
    distances, step = [0] * len(sizes), random.randint(1, 3)
    for axis in order:  # a permuted logical order, with gaps
        distances[axis] = step
        step *= sizes[axis] * random.randint(1, 2)
    strides = [s * random.choice((1, 1, 2)) for s in row_major(sizes)]
    reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
    memory = bits(random, (offset + reach * itemsize + 3,), 1)
    runs = Runs.of_nest(tensor_seed("t"), itemsize, offset, start, sizes, strides, distances)
    values, positions = [], []
    for index in np.ndindex(*sizes):
        at = offset + itemsize * sum(i * s for i, s in zip(index, strides, strict=True))
        values.append(memory[at : at + itemsize].copy().view(f"<u{itemsize}")[0])
        positions.append(start + sum(i * d for i, d in zip(index, distances, strict=True)))
    assert runs.digest(memory) == naive("t", np.array(values, f"<u{itemsize}"), positions)


@settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False), ITEMSIZES, st.integers(0, 30_000))
def test_whole_tensors_across_blocks(random: Random, itemsize: int, numel: int) -> None:
    values = bits(random, (numel,), itemsize)
    assert digest_array("t", values) == naive("t", values, list(range(numel)))


@settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False), ITEMSIZES)
def test_parts_add_up_however_a_tensor_is_cut(random: Random, itemsize: int) -> None:
    rows, columns = random.randint(1, 200), random.randint(1, 3000)
    values = bits(random, (rows, columns), itemsize)
    total, memory = Digest(), values.reshape(-1).view(np.uint8)
    row_cuts = sorted({0, rows, *(random.randrange(rows + 1) for _ in range(2))})
    column_cuts = sorted({0, columns, *(random.randrange(columns + 1) for _ in range(2))})
    parts = [(a, b, c, d) for a, b in pairwise(row_cuts)
             for c, d in pairwise(column_cuts)]  # fmt: skip
    random.shuffle(parts)
    for top, bottom, left, right in parts:
        start, sizes, strides = top * columns + left, (bottom - top, right - left), (columns, 1)
        nest = Runs.of_nest(tensor_seed("t"), itemsize, start * itemsize, start, sizes, strides, strides)
        total += nest.digest(memory)
    assert total == digest_array("t", values)


def test_long_runs_take_the_same_value_as_short_ones() -> None:
    values = bits(Random(1), (6, 1 << 17), 2)
    whole = digest_array("t", values)
    for width in (1 << 17, 1 << 16, 1 << 9, 3 << 8, 1 << 4, 1 << 1):
        parts = Digest()
        for half in range(2):  # every second row, so that rows do not join
            sizes, strides = (values.size // width // 2, width), (2 * width, 1)
            nest = Runs.of_nest(tensor_seed("t"), 2, half * width * 2, half * width, sizes, strides, strides)
            parts += nest.digest(values.reshape(-1).view(np.uint8))
        assert parts == whole


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), ITEMSIZES)
def test_many_runs_give_the_sum_of_their_digests_as_often_as_they_are_asked(random: Random, itemsize: int) -> None:
    held = []
    for n in range(random.randint(0, 4)):
        offset, start, rows, length = (
            random.randint(low, high) for low, high in ((0, 9), (0, 3000), (1, 9), (1, 6000))
        )
        strides = [length + random.choice((0, 1, 5, 1024)), 1]
        gap = [strides[0] + random.choice((0, 1, 512, 1024)), 1]
        memory = bits(random, (offset + rows * strides[0] * itemsize,), 1)
        held.append((memory, Runs.of_nest(n, itemsize, offset, start, [rows, length], strides, gap)))
    compute = Sums(held)
    for _ in range(2):
        assert compute() == sum((runs.elements(memory) for memory, runs in held), Digest())
        for memory, _ in held:
            memory ^= 0x55


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), ITEMSIZES)
def test_every_single_bit_counts(random: Random, itemsize: int) -> None:
    values = bits(random, (random.randint(1, 5000),), itemsize)
    changed = values.copy().view(np.uint8)
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    assert digest_array("t", values) != digest_array("t", changed.view(values.dtype))


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_swapped_elements_are_noticed_even_when_only_one_bit_tells_them_apart(itemsize: int) -> None:
    random = Random(itemsize)
    for bit in range(8 * itemsize):
        for _ in range(8):
            values = bits(random, (4096,), itemsize)
            first, second = random.sample(range(4096), 2)
            values[second] = values[first] ^ values.dtype.type(1 << bit)
            swapped = values.copy()
            swapped[[first, second]] = values[[second, first]]
            assert digest_array("t", values) != digest_array("t", swapped), f"bit {bit} of {first} and {second}"


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_an_even_number_of_changed_signs_is_noticed(itemsize: int) -> None:
    values = bits(Random(itemsize), (4096,), itemsize)
    for step in (1, 2, 4, 8, 64):
        changed = values.copy()
        changed[step - 1 :: step] ^= values.dtype.type(1 << (8 * itemsize - 1))
        assert digest_array("t", values) != digest_array("t", changed)


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), ITEMSIZES)
def test_a_lost_repeated_or_misplaced_segment_is_noticed(random: Random, itemsize: int) -> None:
    values = bits(random, (4000,), itemsize)
    length = random.randint(4, 500)
    first, second = random.randrange(0, 1500), random.randrange(2000, 3500)
    lost, repeated, misplaced = values.copy(), values.copy(), values.copy()
    lost[first : first + length] = 0
    repeated[second : second + length] = values[first : first + length]
    misplaced[first : first + length] = values[first + 1 : first + length + 1]
    digests = {digest_array("t", v) for v in (values, lost, repeated, misplaced)}
    assert len(digests) == 4


def test_names_count() -> None:
    values = bits(Random(1), (100,), 2)
    assert digest_array("gate", values) != digest_array("up", values)
    both = digest_array("gate", values) + digest_array("up", values[::-1].copy())
    assert both != digest_array("gate", values[::-1].copy()) + digest_array("up", values)


def test_hexadecimal_digits_round_trip() -> None:
    digest = digest_array("t", bits(Random(2), (9,), 4))
    assert Digest.from_hex(digest.hex()) == digest
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        Digest.from_hex("12")
