"""Random models on random meshes: what property tests of planners and executors start from.

Everything is drawn from a `random.Random`; hypothesis' `randoms(use_true_random=False)` gives one that shrinks.
Placements are made the way frameworks make them, by slicing and reshaping arrays, here arrays of element numbers. What
such an array assignment says is kept beside the layout (`Rank.assigned`), so that layouts can be checked without boxes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from weft.layout import ITEM_BYTES, Layout, LogicalTensor
from weft.member import Member
from weft.naive import Bits, bits_dtype, poisoned_memory
from weft.testing.assignments import RankBuilder, Write, strided
from weft.testing.units import UNITS, Unit

DTYPES = ("bfloat16", "float32", "float16", "uint8", "float8_e4m3fn", "int64", "float64", "int32")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Parallel sizes and the order in which ranks count through them, first axis slowest."""

    sizes: Mapping[str, int]
    """Of `tp`, `pp`, `ep` and `dp`."""
    order: tuple[str, ...]

    def coordinates(self) -> list[dict[str, int]]:
        """Every rank's place on the mesh, in rank order."""
        ranges = [range(self.sizes[axis]) for axis in self.order]
        return [dict(zip(self.order, place, strict=True)) for place in itertools.product(*ranges)]


@dataclass(frozen=True, slots=True)
class Rank:
    """One member of a side: its layout, and the assignments it was built from."""

    member: Member
    layout: Layout
    writes: tuple[Write, ...]

    def assigned(self, logical: Mapping[str, Bits]) -> dict[str, Bits]:
        """Poisoned memory after the assignments alone: no boxes, and no fills."""
        memory = poisoned_memory(self.layout)
        for write in self.writes:
            strided(memory[write.buffer], write.memory)[...] = strided(logical[write.tensor].ravel(), write.logical)
        return memory


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and two sides that hold it differently."""

    tensors: tuple[LogicalTensor, ...]
    ties: Mapping[str, str]
    """alias → name, for names that have the same values."""
    sources: tuple[Rank, ...]
    targets: tuple[Rank, ...]

    @property
    def layouts(self) -> dict[str, Layout]:
        """Every layout by its address."""
        return {rank.layout.address: rank.layout for rank in (*self.sources, *self.targets)}

    def values(self, seed: int) -> dict[str, Bits]:
        """Random bits for every logical tensor; tied names have the same."""
        generator = np.random.default_rng(seed)
        values = {tensor.name: random_bits(generator, tensor) for tensor in self.tensors}
        return values | {alias: values[name] for alias, name in self.ties.items()}


def random_bits(generator: np.random.Generator, tensor: LogicalTensor) -> Bits:
    """Random bit patterns, without regard to what they mean as numbers."""
    data = generator.integers(0, 256, tensor.numel * ITEM_BYTES[tensor.dtype], dtype=np.uint8)
    return data.view(bits_dtype(tensor.dtype)).reshape(tensor.shape)


def random_mesh(random: Random, *, most: int = 8) -> Mesh:
    """A mesh of at most `most` ranks, counted through in any order."""
    order = ["tp", "pp", "ep", "dp"]
    random.shuffle(order)
    sizes: dict[str, int] = {}
    left = most
    for axis in order:
        sizes[axis] = random.choice([n for n in (1, 1, 2, 3, 4) if n <= left])
        left //= sizes[axis]
    random.shuffle(order)
    return Mesh(sizes, tuple(order))


def random_case(random: Random, *, units: int = 4) -> Case:
    """A model of up to `units` units and two sides that hold it; every target replica wants all of it."""
    made = [random.choice(UNITS)(random, f"unit{n}", random.choice(DTYPES)) for n in range(random.randint(1, units))]
    tensors = {name: tensor for unit in made for name, tensor in unit.tensors.items()}
    ties = {alias: name for unit in made for alias, name in unit.ties.items()}
    sides = [random_side(random, random_mesh(random), made, tensors, source=source) for source in (True, False)]
    kept = tuple(tensor for name, tensor in tensors.items() if name not in ties)
    return Case(kept, ties, sides[0], sides[1])


def random_side(
    random: Random, mesh: Mesh, units: Sequence[Unit], tensors: Mapping[str, LogicalTensor], *, source: bool
) -> tuple[Rank, ...]:
    """Every rank of one side. Units live on one pipeline stage or on all; target replicas are the places along `dp`."""
    placed = [(unit.placement(mesh.sizes, source=source), random.choice((None, 0, 1, 2, 3))) for unit in units]
    fills = not source or random.random() < 0.5
    hosts = random.randint(1, 3)
    ranks: list[Rank] = []
    for number, at in enumerate(mesh.coordinates()):
        builder = RankBuilder(random, tensors, fills=fills)
        for place, stage in placed:
            if stage is None or at["pp"] == stage % mesh.sizes["pp"]:
                place(builder, at)
        layout, writes = builder.build()
        host = f"host{number % hosts}"
        member = Member(
            name=f"trainer/{number}" if source else f"rollout{at['dp']}/{number}",
            source_layout=layout.address if source else None,
            target_layout=None if source else layout.address,
            replica=None if source else f"rollout{at['dp']}",
            replica_size=1 if source else math.prod(mesh.sizes.values()) // mesh.sizes["dp"],
            host=host, domain=host, device="cpu",
        )  # fmt: skip
        ranks.append(Rank(member, layout, writes))
    return tuple(ranks)
