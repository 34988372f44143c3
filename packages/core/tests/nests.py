"""Random memory, and elements in it to be digested."""

from __future__ import annotations

from random import Random

import numpy as np
import torch

from weft.box import row_major
from weft.digest import Runs
from weft.digesters import Held


def random_bytes(random: Random, nbytes: int) -> torch.Tensor:
    generator = np.random.default_rng(random.randrange(1 << 32))
    return torch.from_numpy(generator.integers(0, 256, nbytes, dtype=np.uint8))


def random_nest(random: Random, itemsize: int, most: int) -> Held:
    """A permuted logical order, with gaps there and in memory."""
    sizes = [random.choice((1, 2, 3, random.randint(1, most))) for _ in range(random.randint(1, 4))]
    distances, step = [0] * len(sizes), random.choice((1, 1, 1, 2, 3))
    for axis in random.choice((random.sample(range(len(sizes)), len(sizes)), [*reversed(range(len(sizes)))])):
        distances[axis] = step
        step *= sizes[axis] * random.randint(1, 2)
        if random.random() < 0.3:
            step += -step % random.choice((4, 512, 1024))
    strides = [s * random.choice((1, 1, 1, 2)) for s in row_major(sizes)]
    offset = random.choice((0, 8 * random.randint(0, 5), random.randint(0, 40)))
    start = random.choice((0, 1024 * random.randint(0, 9), random.randint(0, 5000)))
    reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
    memory = random_bytes(random, offset + reach * itemsize + 3)
    runs = Runs.of_nest(random.getrandbits(64), itemsize, offset, start, sizes, strides, distances)
    return memory, runs
