"""Random models on random meshes: what property tests of planners and executors start from.

Everything is drawn from a `random.Random`; hypothesis' `randoms(use_true_random=False)` gives one that shrinks.
Placements are made the way frameworks make them, by slicing and reshaping arrays, here arrays of element numbers. What
such an array assignment says is kept beside the layout (`Rank.assigned`), so that layouts can be checked without boxes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from weft.box import Affine
from weft.layout import ITEM_BYTES, Int64s, Layout, LayoutBuilder, LogicalTensor
from weft.member import Member
from weft.naive import Bits, bits_dtype, poisoned_memory

_CAPACITY = 1 << 16
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
class Write:
    """One array assignment: a strided view of a flattened logical tensor into a strided view of a buffer."""

    tensor: str
    logical: Affine
    buffer: str
    memory: Affine


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
            _strided(memory[write.buffer], write.memory)[...] = _strided(logical[write.tensor].ravel(), write.logical)
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


def affine(view: Int64s, base: Int64s) -> Affine:
    """The strided view of flat memory that `view` is of `base`."""
    offset = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // base.itemsize
    return Affine(offset, view.shape, tuple(stride // base.itemsize for stride in view.strides))


def _strided(flat: Bits, view: Affine) -> Bits:
    strides = [stride * flat.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.sizes, strides)


@dataclass(slots=True)
class _Buffer:
    name: str
    dtype: str
    group: str
    ids: Int64s = field(default_factory=lambda: np.arange(_CAPACITY, dtype=np.int64))
    used: int = 0


class _RankBuilder:
    """Lays out one rank: places blocks of memory, and assigns parts of logical tensors to parts of blocks."""

    def __init__(self, random: Random, tensors: Mapping[str, LogicalTensor], *, fills: bool) -> None:
        self._random = random
        self._tensors = tensors
        self._fills = fills
        self._ids = {name: np.arange(t.numel, dtype=np.int64).reshape(t.shape) for name, t in tensors.items()}
        self._buffers: list[_Buffer] = []
        self._padding: list[tuple[_Buffer, Int64s]] = []
        self._writes: list[Write] = []
        self._names: set[str] = set()
        self._tied: list[tuple[str, str]] = []

    def logical(self, name: str) -> Int64s:
        """Element numbers of a whole logical tensor, in its shape."""
        return self._ids[name]

    def tie(self, alias: str, name: str) -> None:
        self._tied.append((alias, name))

    def declare(self, name: str) -> None:
        """Say that the rank knows a tensor, though it may hold none of it."""
        self._names.add(name)

    def block(self, shape: Sequence[int], dtype: str, group: str) -> Int64s:
        """Memory for an array of this shape: dense, transposed, with padded rows, alone or behind others."""
        buffers = [buffer for buffer in self._buffers if (buffer.dtype, buffer.group) == (dtype, group)]
        if buffers and self._random.random() < 0.5:
            buffer = buffers[-1]
        else:
            buffer = _Buffer(f"buffer{len(self._buffers)}", dtype, group)
            self._buffers.append(buffer)
        if self._random.random() < 0.3:
            self.pad(buffer, buffer.used, self._random.randint(1, 5))
        axes = list(range(len(shape)))
        if self._random.random() < 0.3:
            self._random.shuffle(axes)
        padded = [shape[axis] for axis in axes]
        room = self._random.randint(1, 3) if shape and self._random.random() < 0.2 else 0
        if room:
            padded[-1] += room
        numel = math.prod(padded)
        stored = buffer.ids[buffer.used : buffer.used + numel].reshape(padded)
        buffer.used += numel
        if room:
            self._padding.append((buffer, stored[..., -room:]))
            stored = stored[..., :-room]
        return stored.transpose([axes.index(axis) for axis in range(len(shape))])

    def pad(self, buffer: _Buffer, start: int, numel: int) -> None:
        buffer.used = start + numel
        self._padding.append((buffer, buffer.ids[start : start + numel]))

    def pad_view(self, view: Int64s) -> None:
        """Declare part of a block as padding."""
        if view.size:
            self._padding.append((self._owner(view), view))

    def write(self, name: str, logical: Int64s, memory: Int64s) -> None:
        """Assign a view of a logical tensor's element numbers to a view of a block."""
        if logical.shape != memory.shape:
            raise ValueError(f"{name}: {logical.shape} does not go into {memory.shape}")
        self.declare(name)
        if logical.size:
            buffer = self._owner(memory)
            source = affine(logical, self._ids[name])
            self._writes.append(Write(name, source, buffer.name, affine(memory, buffer.ids)))

    def whole(self, name: str, logical: Int64s, group: str) -> None:
        """A block of its own for a view of a logical tensor."""
        self.write(name, logical, self.block(logical.shape, self._tensors[name].dtype, group))

    def build(self) -> tuple[Layout, tuple[Write, ...]]:
        builder = LayoutBuilder()
        for name in sorted(self._names):
            tensor = self._tensors[name]
            builder.tensor(name, tensor.shape, tensor.dtype)
        for buffer in self._buffers:
            if self._random.random() < 0.2:
                self.pad(buffer, buffer.used, self._random.randint(1, 5))
            builder.buffer(buffer.name, buffer.dtype, buffer.used, group=buffer.group)
        for write in self._writes:
            builder.view(write.tensor, write.logical, write.buffer, write.memory)
        for buffer, view in self._padding:
            if self._fills and view.size:
                at = affine(view, buffer.ids)
                builder.fill(buffer.name, at.offset, at.sizes, at.strides, self._random.choice((0.0, 1.0, 2.0)))
        for alias, name in self._tied:
            builder.tie(alias, name)
        return builder.build(), tuple(self._writes)

    def _owner(self, memory: Int64s) -> _Buffer:
        return next(buffer for buffer in self._buffers if np.may_share_memory(buffer.ids, memory))


Place = Callable[[_RankBuilder, Mapping[str, int]], None]
"""Lays out one unit's share on the rank with these mesh coordinates."""


def shares(random: Random, length: int, ranks: int, *, overlap: bool = True) -> list[tuple[int, int]]:
    """Half-open ranges that cover `length`: ceiling chunks, even remainders, any cuts, or cuts that overlap."""
    style = random.choice(("chunk", "spread", "cuts", "overlap") if overlap else ("chunk", "spread", "cuts"))
    if style == "chunk":
        step = -(-length // ranks)
        return [(min(r * step, length), min((r + 1) * step, length)) for r in range(ranks)]
    if style == "spread":
        ends = [r * length // ranks for r in range(ranks + 1)]
    else:
        ends = [0, *sorted(random.randint(0, length) for _ in range(ranks - 1)), length]
    extra = 1 if style == "overlap" else 0
    return [(max(0, low - extra), min(length, high + extra)) for low, high in itertools.pairwise(ends)]


class _Unit:
    """Some logical tensors that frameworks place together, and the ways to place them."""

    def __init__(self, random: Random, name: str, dtype: str) -> None:
        self.random, self.name, self.dtype = random, name, dtype
        self.group = f"layer{random.randint(0, 2)}"
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.ties: dict[str, str] = {}

    @property
    def tensors(self) -> dict[str, LogicalTensor]:
        return {name: LogicalTensor(name, shape, self.dtype) for name, shape in self.shapes.items()}

    def placement(self, sizes: Mapping[str, int], *, source: bool) -> Place:
        raise NotImplementedError

    def any_shard(self, name: str, sizes: Mapping[str, int], *, source: bool) -> Place:
        """Replicated, or sharded on one axis or two; at sources also over replicas."""
        shape, group = self.shapes[name], self.group
        cuts: list[tuple[str, int, list[tuple[int, int]]]] = []
        for mesh_axis in ("tp", "ep", "dp") if source else ("tp", "ep"):
            if shape and self.random.random() < 0.6:
                axis = self.random.randrange(len(shape))
                if axis not in [cut[1] for cut in cuts]:
                    cuts.append((mesh_axis, axis, shares(self.random, shape[axis], sizes[mesh_axis])))

        def place(rank: _RankBuilder, at: Mapping[str, int]) -> None:
            view = rank.logical(name)
            for mesh_axis, axis, ranges in cuts:
                low, high = ranges[at[mesh_axis]]
                view = view[(slice(None),) * axis + (slice(low, high),)]
            rank.whole(name, view, group)

        return place


class _Plain(_Unit):
    def __init__(self, random: Random, name: str, dtype: str) -> None:
        super().__init__(random, name, dtype)
        self.shapes[f"{name}.weight"] = tuple(random.randint(1, 9) for _ in range(random.randint(0, 3)))

    def placement(self, sizes: Mapping[str, int], *, source: bool) -> Place:
        return self.any_shard(f"{self.name}.weight", sizes, source=source)


class _Attention(_Unit):
    """q, k and v projections: apart, interleaved per group, or stacked per rank with replicated heads."""

    def __init__(self, random: Random, name: str, dtype: str) -> None:
        super().__init__(random, name, dtype)
        self.groups, self.queries, self.head = random.choice((1, 2, 3, 4)), random.randint(1, 3), random.randint(1, 3)
        self.hidden = (random.randint(1, 4),) if random.random() < 0.7 else ()
        heads = {"q": self.groups * self.queries, "k": self.groups, "v": self.groups}
        self.shapes |= {f"{name}.{part}": (count * self.head, *self.hidden) for part, count in heads.items()}

    def placement(self, sizes: Mapping[str, int], *, source: bool) -> Place:
        style = self.random.choice(("apart", "interleaved", "interleaved", "stacked", "stacked"))
        tp = sizes["tp"]
        heads_fit = self.groups * self.queries % tp == 0 and 0 in (self.groups % tp, tp % self.groups)
        if style == "stacked" and heads_fit:
            return lambda rank, at: self._stacked(rank, at["tp"], tp)
        if style == "interleaved":
            rows = self.groups * (self.queries + 2) * self.head
            ranges = shares(self.random, rows, tp)
            return lambda rank, at: self._interleaved(rank, *ranges[at["tp"]])
        places = [self.any_shard(name, sizes, source=source) for name in self.shapes]

        def apart(rank: _RankBuilder, at: Mapping[str, int]) -> None:
            for place in places:
                place(rank, at)

        return apart

    def _stacked(self, rank: _RankBuilder, r: int, tp: int) -> None:
        queries = self.groups * self.queries // tp * self.head
        keys = max(1, self.groups // tp) * self.head
        first = r * self.groups // tp * self.head if self.groups < tp else r * keys
        block = rank.block((queries + 2 * keys, *self.hidden), self.dtype, self.group)
        q, k, v = (rank.logical(f"{self.name}.{part}") for part in "qkv")
        rank.write(f"{self.name}.q", q[r * queries : (r + 1) * queries], block[:queries])
        rank.write(f"{self.name}.k", k[first : first + keys], block[queries : queries + keys])
        rank.write(f"{self.name}.v", v[first : first + keys], block[queries + keys :])

    def _interleaved(self, rank: _RankBuilder, low: int, high: int) -> None:
        """Rows low:high of the fused tensor whose rows are, per group, its q heads, k, v."""
        block = rank.block((high - low, *self.hidden), self.dtype, self.group)
        per_group = (self.queries + 2) * self.head
        first, last = -(-low // per_group), high // per_group
        parts = {"q": (0, self.queries), "k": (self.queries, 1), "v": (self.queries + 1, 1)}
        for part, (start, count) in parts.items():
            name, rows = f"{self.name}.{part}", count * self.head
            begin = start * self.head
            logical = rank.logical(name)
            rank.declare(name)
            whole = last - first
            if whole > 0:
                grouped = logical.reshape(self.groups, rows, *self.hidden)[first:last]
                local = block[first * per_group - low : last * per_group - low]
                local = local.reshape(whole, per_group, *self.hidden)
                rank.write(name, grouped, local[:, begin : begin + rows])
            edges = [(low, first * per_group), (last * per_group, high)] if whole >= 0 else [(low, high)]
            for edge_low, edge_high in edges:
                group = edge_low // per_group
                a = max(edge_low, group * per_group + begin)
                b = min(edge_high, group * per_group + begin + rows)
                if a < b:
                    at = group * rows + a - group * per_group - begin
                    rank.write(name, logical[at : at + b - a], block[a - low : b - low])


class _Gated(_Unit):
    """gate and up: two tensors, or one of alternating columns; fused per rank, fused whole, alternating or apart."""

    def __init__(self, random: Random, name: str, dtype: str) -> None:
        super().__init__(random, name, dtype)
        self.rows, self.hidden = random.randint(1, 9), random.randint(1, 4)
        self.alternating = random.random() < 0.4
        if self.alternating:
            self.shapes[f"{name}.gate_up"] = (self.hidden, 2 * self.rows)
        else:
            self.shapes |= {f"{name}.{half}": (self.rows, self.hidden) for half in ("gate", "up")}

    def _halves(self, rank: _RankBuilder) -> list[tuple[str, Int64s]]:
        """Both halves as (rows, hidden)."""
        if self.alternating:
            name = f"{self.name}.gate_up"
            columns = rank.logical(name).reshape(self.hidden, self.rows, 2)
            return [(name, columns[:, :, half].T) for half in (0, 1)]
        return [(name, rank.logical(name)) for name in (f"{self.name}.gate", f"{self.name}.up")]

    def placement(self, sizes: Mapping[str, int], *, source: bool) -> Place:
        style = self.random.choice(("apart", "per_rank", "whole", "alternating"))
        length = 2 * self.rows if style == "whole" else self.rows
        ranges = shares(self.random, length, sizes["tp"])
        if style == "apart":
            places = [self.any_shard(name, sizes, source=source) for name in self.shapes]

        def place(rank: _RankBuilder, at: Mapping[str, int]) -> None:
            if style == "apart":
                for one in places:
                    one(rank, at)
                return
            low, high = ranges[at["tp"]]
            count = high - low
            block = rank.block((count if style == "whole" else 2 * count, self.hidden), self.dtype, self.group)
            for half, (name, logical) in enumerate(self._halves(rank)):
                if style == "per_rank":
                    rank.write(name, logical[low:high], block[half * count : (half + 1) * count])
                elif style == "alternating":
                    rank.write(name, logical[low:high], block[half::2])
                else:
                    a, b = max(low, half * self.rows), min(high, (half + 1) * self.rows)
                    rank.declare(name)
                    if a < b:
                        rank.write(name, logical[a - half * self.rows : b - half * self.rows], block[a - low : b - low])

        return place


class _Experts(_Unit):
    """Experts: one stacked tensor or one tensor each; on a rank stacked or apart; contiguous or dealt out in turn."""

    def __init__(self, random: Random, name: str, dtype: str) -> None:
        super().__init__(random, name, dtype)
        self.count, self.shape = random.randint(1, 5), (random.randint(1, 5), random.randint(1, 4))
        self.stacked = random.random() < 0.5
        if self.stacked:
            self.shapes[f"{name}.experts"] = (self.count, *self.shape)
        else:
            self.shapes |= {f"{name}.experts.{e}": self.shape for e in range(self.count)}

    def placement(self, sizes: Mapping[str, int], *, source: bool) -> Place:
        dealt, stacked = self.random.random() < 0.3, self.random.random() < 0.5
        axis = self.random.randrange(2)
        experts = shares(self.random, self.count, sizes["ep"], overlap=False)
        ranges = shares(self.random, self.shape[axis], sizes["tp"], overlap=False)

        def place(rank: _RankBuilder, at: Mapping[str, int]) -> None:
            mine = slice(at["ep"], None, sizes["ep"]) if dealt else slice(*experts[at["ep"]])
            numbers = range(self.count)[mine]
            inner = slice(*ranges[at["tp"]])
            part = (inner, slice(None)) if axis == 0 else (slice(None), inner)
            local = tuple(len(range(n)[s]) for n, s in zip(self.shape, part, strict=True))
            if stacked:
                block = rank.block((len(numbers), *local), self.dtype, self.group)
                blocks = [block[n] for n in range(len(numbers))]
            if stacked and self.stacked:
                rank.write(f"{self.name}.experts", rank.logical(f"{self.name}.experts")[(mine, *part)], block)
                return
            if not stacked:
                blocks = [rank.block(local, self.dtype, self.group) for _ in numbers]
            for expert, one in zip(numbers, blocks, strict=True):
                name = f"{self.name}.experts" if self.stacked else f"{self.name}.experts.{expert}"
                logical = rank.logical(name)[expert] if self.stacked else rank.logical(name)
                rank.write(name, logical[part], one)

        return place


class _Vocabulary(_Unit):
    """Embeddings: rows padded differently on either side, with a second name that is tied or has memory of its own."""

    def __init__(self, random: Random, name: str, dtype: str) -> None:
        super().__init__(random, name, dtype)
        self.rows, self.hidden = random.randint(1, 11), random.randint(1, 4)
        self.shapes[f"{name}.embed"] = (self.rows, self.hidden)
        self.second = random.choice(("none", "tied", "tied_at_source", "own"))
        if self.second != "none":
            self.shapes[f"{name}.head"] = self.shapes[f"{name}.embed"]
        if self.second in ("tied", "tied_at_source"):
            self.ties[f"{name}.head"] = f"{name}.embed"

    def placement(self, sizes: Mapping[str, int], *, source: bool) -> Place:
        tp = sizes["tp"]
        multiple = self.random.choice((1, 2, 4, 7))
        share = -(-self.rows // (tp * multiple)) * multiple
        tied = self.second == "tied" or (self.second == "tied_at_source" and source)
        names = [f"{self.name}.embed"] if tied or self.second == "none" else list(self.shapes)

        def place(rank: _RankBuilder, at: Mapping[str, int]) -> None:
            low = min(at["tp"] * share, self.rows)
            real = min(share, self.rows - low)
            for name in names:
                block = rank.block((share, self.hidden), self.dtype, self.group)
                rank.write(name, rank.logical(name)[low : low + real], block[:real])
                rank.pad_view(block[real:])
            if tied:
                rank.tie(f"{self.name}.head", f"{self.name}.embed")

        return place


_UNITS = (_Plain, _Plain, _Attention, _Gated, _Experts, _Vocabulary)


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
    made = [random.choice(_UNITS)(random, f"unit{n}", random.choice(DTYPES)) for n in range(random.randint(1, units))]
    tensors = {name: tensor for unit in made for name, tensor in unit.tensors.items()}
    ties = {alias: name for unit in made for alias, name in unit.ties.items()}
    sides = [random_side(random, random_mesh(random), made, tensors, source=source) for source in (True, False)]
    kept = tuple(tensor for name, tensor in tensors.items() if name not in ties)
    return Case(kept, ties, sides[0], sides[1])


def random_side(
    random: Random, mesh: Mesh, units: Sequence[_Unit], tensors: Mapping[str, LogicalTensor], *, source: bool
) -> tuple[Rank, ...]:
    """Every rank of one side. Units live on one pipeline stage or on all; target replicas are the places along `dp`."""
    placed = [(unit.placement(mesh.sizes, source=source), random.choice((None, 0, 1, 2, 3))) for unit in units]
    fills = not source or random.random() < 0.5
    hosts = random.randint(1, 3)
    ranks: list[Rank] = []
    for number, at in enumerate(mesh.coordinates()):
        builder = _RankBuilder(random, tensors, fills=fills)
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
