"""Layers that keep a state instead of keys and values, as vLLM's tensor-parallel ranks hold them.

Sources: `vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py` with `gqa_interleaved_layout` (q, k, v and z
rows of a key head stand together in the checkpoint, so that a range of key heads is a range of rows) and
`layers/mamba/mamba_mixer2.py` (z, x, B, C and dt are cut each for itself; one group of B and C is whole on every rank,
and of `A_log` the engine keeps `-exp`, which its own loader computes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weft_vllm.mesh import Mesh, Place
from weft_vllm.parameters import (
    LOADER,
    Parameter,
    Part,
    column_parallel,
    cut,
    kinds,
    row_parallel,
    vector,
    whole,
)


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """Gated-delta attention of Qwen3-Next."""

    key_heads: int
    value_heads: int
    key_head: int
    value_head: int
    kernel: int
    """Steps that the convolution looks back."""

    def faults(self, mesh: Mesh) -> list[str]:
        """Heads that do not divide."""
        cuts = (("gated-delta key heads", self.key_heads), ("gated-delta value heads", self.value_heads))
        return [f"{what} {size} over tp {mesh.tp}" for what, size in cuts if size % mesh.tp]

    def parameters(self, name: str, hidden: int, place: Place) -> Iterator[Parameter]:
        """Those of one layer's module `name`, in the order of registration."""
        keys, values = self.key_heads * self.key_head, self.value_heads * self.value_head
        yield column_parallel(f"{name}.dt_bias", (self.value_heads,), place)
        yield column_parallel(f"{name}.A_log", (self.value_heads,), place, "float32")
        convolution = f"{name}.conv1d.weight"
        yield Parameter(convolution, _pieces(convolution, (keys, keys, values), (1, self.kernel), place))
        yield column_parallel(f"{name}.in_proj_qkvz.weight", (2 * (keys + values), hidden), place)
        yield column_parallel(f"{name}.in_proj_ba.weight", (2 * self.value_heads, hidden), place)
        yield vector(f"{name}.norm.weight", self.value_head)
        yield from row_parallel(f"{name}.out_proj", hidden, values, place)


@dataclass(frozen=True, slots=True)
class Mamba:
    """Mamba-2 of Nemotron-H."""

    heads: int
    head: int
    groups: int
    """Of heads that share B and C."""
    state: int
    kernel: int
    """Steps that the convolution looks back."""

    def faults(self, mesh: Mesh) -> list[str]:
        """Heads and groups that do not divide."""
        faults = [f"mamba heads {self.heads} over tp {mesh.tp}"] if self.heads % mesh.tp else []
        if self.groups != 1 and self.groups % mesh.tp:
            faults.append(f"mamba groups {self.groups} over tp {mesh.tp}: vLLM repeats a group only where there is one")
        return faults

    def parameters(self, name: str, hidden: int, place: Place) -> Iterator[Parameter]:
        """Those of one layer's module `name`, in the order of registration."""
        inner, shared = self.heads * self.head, self.groups * self.state
        computed = f"{name}.A_log"
        yield Parameter(LOADER + computed, [whole(computed, self.heads)])
        for each in ("D", "dt_bias"):
            yield column_parallel(f"{name}.{each}", (self.heads,), place)
        repeated = self.groups == 1
        for kind in kinds(bias=True):
            convolution = f"{name}.conv1d.{kind}"
            rest = (1, self.kernel) if kind == "weight" else ()
            yield Parameter(
                convolution, _pieces(convolution, (inner, shared, shared), rest, place, (1, 2) if repeated else ())
            )
        projection = f"{name}.in_proj.weight"
        sizes = (inner, inner, shared, shared, self.heads)
        yield Parameter(projection, _pieces(projection, sizes, (hidden,), place, (2, 3) if repeated else ()))
        yield from row_parallel(f"{name}.out_proj", hidden, inner, place)
        yield column_parallel(f"{name}.norm.weight", (inner,), place)


def _pieces(
    name: str, sizes: Sequence[int], rest: tuple[int, ...], place: Place, whole_ones: Sequence[int] = ()
) -> list[Part]:
    """A tensor whose rows are several blocks of these `sizes`, each of them cut, but for those that every rank has."""
    shape, first, parts = (sum(sizes), *rest), 0, []
    for number, size in enumerate(sizes):
        here = size if number in whole_ones else size // place.mesh.tp
        start = 0 if number in whole_ones else place.tp_rank * here
        parts.append(cut(name, shape, 0, first + start, here))
        first += size
    return parts
