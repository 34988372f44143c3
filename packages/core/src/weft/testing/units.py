"""Logical tensors that frameworks place together, each with the ways to place them on a mesh."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from random import Random

from weft.layout import Int64s, LogicalTensor
from weft.testing.assignments import RankBuilder

Place = Callable[[RankBuilder, Mapping[str, int]], None]
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


class Unit:
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

        def place(rank: RankBuilder, at: Mapping[str, int]) -> None:
            view = rank.logical(name)
            for mesh_axis, axis, ranges in cuts:
                low, high = ranges[at[mesh_axis]]
                view = view[(slice(None),) * axis + (slice(low, high),)]
            rank.whole(name, view, group)

        return place


class _Plain(Unit):
    def __init__(self, random: Random, name: str, dtype: str) -> None:
        super().__init__(random, name, dtype)
        self.shapes[f"{name}.weight"] = tuple(random.randint(1, 9) for _ in range(random.randint(0, 3)))

    def placement(self, sizes: Mapping[str, int], *, source: bool) -> Place:
        return self.any_shard(f"{self.name}.weight", sizes, source=source)


class _Attention(Unit):
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

        def apart(rank: RankBuilder, at: Mapping[str, int]) -> None:
            for place in places:
                place(rank, at)

        return apart

    def _stacked(self, rank: RankBuilder, r: int, tp: int) -> None:
        queries = self.groups * self.queries // tp * self.head
        keys = max(1, self.groups // tp) * self.head
        first = r * self.groups // tp * self.head if self.groups < tp else r * keys
        block = rank.block((queries + 2 * keys, *self.hidden), self.dtype, self.group)
        q, k, v = (rank.logical(f"{self.name}.{part}") for part in "qkv")
        rank.write(f"{self.name}.q", q[r * queries : (r + 1) * queries], block[:queries])
        rank.write(f"{self.name}.k", k[first : first + keys], block[queries : queries + keys])
        rank.write(f"{self.name}.v", v[first : first + keys], block[queries + keys :])

    def _interleaved(self, rank: RankBuilder, low: int, high: int) -> None:
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


class _Gated(Unit):
    """gate and up: two tensors, or one of alternating columns; fused per rank, fused whole, alternating or apart."""

    def __init__(self, random: Random, name: str, dtype: str) -> None:
        super().__init__(random, name, dtype)
        self.rows, self.hidden = random.randint(1, 9), random.randint(1, 4)
        self.alternating = random.random() < 0.4
        if self.alternating:
            self.shapes[f"{name}.gate_up"] = (self.hidden, 2 * self.rows)
        else:
            self.shapes |= {f"{name}.{half}": (self.rows, self.hidden) for half in ("gate", "up")}

    def _halves(self, rank: RankBuilder) -> list[tuple[str, Int64s]]:
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

        def place(rank: RankBuilder, at: Mapping[str, int]) -> None:
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


class _Experts(Unit):
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

        def place(rank: RankBuilder, at: Mapping[str, int]) -> None:
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


class _Vocabulary(Unit):
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

        def place(rank: RankBuilder, at: Mapping[str, int]) -> None:
            low = min(at["tp"] * share, self.rows)
            real = min(share, self.rows - low)
            for name in names:
                block = rank.block((share, self.hidden), self.dtype, self.group)
                rank.write(name, rank.logical(name)[low : low + real], block[:real])
                rank.pad_view(block[real:])
            if tied:
                rank.tie(f"{self.name}.head", f"{self.name}.embed")

        return place


UNITS = (_Plain, _Plain, _Attention, _Gated, _Experts, _Vocabulary)
