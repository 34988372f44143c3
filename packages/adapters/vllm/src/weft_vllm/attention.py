"""Attention, as vLLM's tensor-parallel ranks hold it.

Sources: `vllm/model_executor/layers/linear.py` (`QKVParallelLinear`: a rank's q, k and v rows are stacked, KV heads are
repeated when there are fewer than ranks), `models/qwen3_next.py` (a gate beside every query head) and
`models/deepseek_v2.py` (`fused_qkv_a_proj`: what narrows queries over what narrows keys and values, whole on every
rank; `Indexer`, whole on every rank too).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weft_vllm.mesh import Mesh, Place
from weft_vllm.parameters import Parameter, column_parallel, cut, kinds, row_parallel, vector, whole


@dataclass(frozen=True, slots=True)
class GroupedQuery:
    """Attention with key and value heads of its own."""

    heads: int
    kv_heads: int
    head: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    gated: bool = False
    """Whether the rows of every query head are followed by as many of its output's gate."""
    sinks: bool = False
    """Whether every head has a learned attention sink."""
    repeats: bool = True
    """Whether ranks beyond the number of KV heads repeat them."""

    def faults(self, mesh: Mesh) -> list[str]:
        """Heads that do not divide."""
        tp, kv_heads = mesh.tp, self.kv_heads
        faults = [f"heads {self.heads} over tp {tp}"] if self.heads % tp else []
        if max(kv_heads, tp) % min(kv_heads, tp):
            faults.append(f"KV heads {kv_heads} against tp {tp}")
        elif tp > kv_heads and not self.repeats:
            faults.append(f"KV heads {kv_heads} against tp {tp}: vLLM does not repeat those of this family")
        return faults

    def parameters(self, name: str, hidden: int, place: Place) -> Iterator[Parameter]:
        """Those of one layer's module `name`, in the order of registration."""
        tp, rank = place.mesh.tp, place.tp_rank
        if self.sinks:
            heads = self.heads // tp
            yield Parameter(f"{name}.sinks", [cut(f"{name}.sinks", (self.heads,), 0, rank * heads, heads)])
        width = self.heads * self.head
        query = width * (2 if self.gated else 1)
        kv_rows, kv_first = max(1, self.kv_heads // tp) * self.head, rank * self.kv_heads // tp * self.head
        ranges = [("q", query, rank * query // tp, query // tp)]
        ranges += [(part, self.kv_heads * self.head, kv_first, kv_rows) for part in "kv"]
        for kind in kinds(self.qkv_bias):
            columns = (hidden,) if kind == "weight" else ()
            parts = [cut(f"{name}.{p}_proj.{kind}", (total, *columns), 0, first, n) for p, total, first, n in ranges]
            yield Parameter(f"{name}.qkv_proj.{kind}", parts)
        yield from row_parallel(f"{name}.o_proj", hidden, width, place, bias=self.out_bias)
        for norm in ("q_norm", "k_norm") if self.qk_norm else ():
            yield vector(f"{name}.{norm}.weight", self.head)


@dataclass(frozen=True, slots=True)
class Indexer:
    """What chooses the tokens that sparse attention looks at."""

    heads: int
    head: int

    def parameters(self, name: str, hidden: int, query_rank: int) -> Iterator[Parameter]:
        """Those of one layer, the same on every rank."""
        queries = f"{name}.wq_b.weight"
        yield Parameter(queries, [whole(queries, self.heads * self.head, query_rank)])
        rows = (("wk", self.head), ("weights_proj", self.heads))
        parts = [whole(f"{name}.{part}.weight", count, hidden) for part, count in rows]
        yield Parameter(f"{name}.wk_weights_proj.weight", parts)
        for kind in ("weight", "bias"):
            yield vector(f"{name}.k_norm.{kind}", self.head, "float32")


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-latent attention: queries, and keys with values, go through narrow projections that every rank has."""

    heads: int
    query_rank: int | None
    """None when queries are projected at once."""
    value_rank: int
    """Width of what keys and values are made from (`kv_lora_rank`)."""
    plain_head: int
    """Part of a query and key head without positions (`qk_nope_head_dim`)."""
    rotary_head: int
    value_head: int
    indexer: Indexer | None = None

    def faults(self, mesh: Mesh) -> list[str]:
        """Heads that do not divide."""
        return [f"heads {self.heads} over tp {mesh.tp}"] if self.heads % mesh.tp else []

    def parameters(self, name: str, hidden: int, place: Place) -> Iterator[Parameter]:
        """Those of one layer's module `name`, in the order of registration."""
        narrow = f"{name}.kv_a_proj_with_mqa.weight"
        query = self.heads * (self.plain_head + self.rotary_head)
        narrows = [whole(narrow, self.value_rank + self.rotary_head, hidden)]
        if self.query_rank is None:
            yield Parameter(narrow, narrows)
            yield column_parallel(f"{name}.q_proj.weight", (query, hidden), place)
        else:
            queries = whole(f"{name}.q_a_proj.weight", self.query_rank, hidden)
            yield Parameter(f"{name}.fused_qkv_a_proj.weight", [queries, *narrows])
            yield vector(f"{name}.q_a_layernorm.weight", self.query_rank)
            yield column_parallel(f"{name}.q_b_proj.weight", (query, self.query_rank), place)
        yield vector(f"{name}.kv_a_layernorm.weight", self.value_rank)
        keys_and_values = self.heads * (self.plain_head + self.value_head)
        yield column_parallel(f"{name}.kv_b_proj.weight", (keys_and_values, self.value_rank), place)
        yield from row_parallel(f"{name}.o_proj", hidden, self.heads * self.value_head, place)
        if self.indexer is not None and self.query_rank is not None:
            yield from self.indexer.parameters(f"{name}.indexer", hidden, self.query_rank)
