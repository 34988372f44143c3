"""Feed-forward layers, with experts and without, as the ranks of a vLLM engine hold them.

Sources: `vllm/model_executor/layers/linear.py` (`MergedColumnParallelLinear`: gate over up, each cut) and
`layers/fused_moe/config.py` (experts stacked; with expert parallelism whole).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weft_vllm.mesh import Mesh, Place
from weft_vllm.parameters import Parameter, Part, cut, kinds, row_parallel, vector, whole


@dataclass(frozen=True, slots=True)
class Dense:
    """A layer without experts."""

    width: int
    what: str = "MLP width"
    """What to call the width."""
    bias: bool = False
    gated: bool = True
    spread_whole: bool = False
    """Whether it is whole on every rank where tokens are spread over tensor-parallel ranks."""
    stages_cut: bool = False
    """Whether it is cut all the same where there are pipeline stages."""

    def faults(self, mesh: Mesh) -> list[str]:
        """A width that does not divide."""
        divides = self.is_whole(mesh) or self.width % mesh.tp == 0
        return [] if divides else [f"{self.what} {self.width} over tp {mesh.tp}"]

    def is_whole(self, mesh: Mesh) -> bool:
        """Whether every rank has all of it."""
        return self.spread_whole and mesh.sequence_parallel_experts and not (self.stages_cut and mesh.pp > 1)

    def parameters(self, name: str, hidden: int, place: Place) -> Iterator[Parameter]:
        """Gate over up, or up alone, and down."""
        is_whole = self.is_whole(place.mesh)
        here = self.width if is_whole else self.width // place.mesh.tp
        first = 0 if is_whole else place.tp_rank * here
        for kind in kinds(self.bias):
            shape = (self.width, hidden) if kind == "weight" else (self.width,)
            names = ("gate", "up") if self.gated else ("up",)
            parts = [cut(f"{name}.{part}_proj.{kind}", shape, 0, first, here) for part in names]
            yield Parameter(f"{name}.{'_'.join(names)}_proj.{kind}", parts)
        yield from row_parallel(f"{name}.down_proj", hidden, self.width, place, bias=self.bias, is_whole=is_whole)


@dataclass(frozen=True, slots=True)
class Experts:
    """The layers of a mixture."""

    count: int
    width: int
    inner: tuple[str, ...] = ("gate_proj", "up_proj")
    """What is stacked in an expert, in this order; experts without a gate have one."""
    outer: str = "down_proj"
    alternating: bool = False
    """Whether the checkpoint has the experts of a layer in one tensor, with alternating gate and up columns, and biases
    for them and the router."""
    router: str = "gate"
    router_dtype: str | None = None
    """When it is not the engine's."""
    corrected: bool = False
    """Whether the router has a float32 `e_score_correction_bias`."""
    shared: Dense | None = None
    """The experts that every token goes through, together."""
    shared_name: str = "shared_experts"
    shared_gate: bool = False
    """Whether a vector decides how much of the shared expert a token gets."""

    def faults(self, mesh: Mesh) -> list[str]:
        """Sizes that do not divide, and what vLLM would do that is not mapped."""
        tp, physical = mesh.tp, self.count + mesh.redundant
        faults = [f"expert width {self.width} over tp {tp}"] if mesh.ep == 1 and self.width % tp else []
        faults += self.shared.faults(mesh) if self.shared else []
        if mesh.ep == 1 and mesh.dp > 1:
            faults.append(
                f"dp {mesh.dp} without ep: vLLM then cuts every expert over all tp {tp} · dp {mesh.dp} ranks, which is "
                f"not mapped; say ep{tp * mesh.dp} for expert parallelism, or replicas{mesh.dp} for engines of their "
                "own"
            )
        if self.alternating and self.count % mesh.ep:
            faults.append(f"experts {self.count} over ep {mesh.ep}: vLLM loads equally many of this family everywhere")
        if mesh.ep > physical:
            faults.append(f"experts {physical} over ep {mesh.ep}")
        if mesh.redundant and physical % mesh.ep:
            faults.append(f"experts {self.count} + {mesh.redundant} redundant over ep {mesh.ep}: copies must divide")
        return faults

    def parameters(self, name: str, hidden: int, place: Place) -> Iterator[Parameter]:
        """The router, shared experts, and this rank's experts stacked: all of them cut, or with expert parallelism some
        of them whole.
        """
        if self.alternating:
            yield from self._alternating(name, hidden, place)
            return
        router = f"{name}.{self.router}"
        yield Parameter(f"{router}.weight", [whole(f"{router}.weight", self.count, hidden)], dtype=self.router_dtype)
        if self.corrected:
            yield vector(f"{router}.e_score_correction_bias", self.count, "float32")
        shared = f"{name}.{self.shared_name}"
        if self.shared_gate:
            yield Parameter(f"{shared}_gate.weight", [whole(f"{shared}_gate.weight", 1, hidden)])
        if self.shared:
            yield from self.shared.parameters(shared, hidden, place)
        here = [f"{name}.experts.{number}" for number in place.experts(self.count)]
        first, width = self._width(place)
        shape = (self.width, hidden)
        w13 = [cut(f"{expert}.{part}.weight", shape, 0, first, width) for expert in here for part in self.inner]
        w2 = [cut(f"{expert}.{self.outer}.weight", (hidden, self.width), 1, first, width) for expert in here]
        yield Parameter(f"{name}.experts.routed_experts.w13_weight", w13)
        yield Parameter(f"{name}.experts.routed_experts.w2_weight", w2)

    def _alternating(self, name: str, hidden: int, place: Place) -> Iterator[Parameter]:
        """As `models/gpt_oss.py` loads experts that are not quantized: ranges of tensors that hold all of a layer, with
        the columns of the checkpoint as rows; gate and up stay alternating, and the first rank alone has the bias of
        what all ranks add up.
        """
        router, target = f"{name}.{self.router}", f"{name}.experts.routed_experts"
        yield Parameter(f"{router}.weight", [whole(f"{router}.weight", self.count, hidden)])
        yield vector(f"{router}.bias", self.count)
        held = place.experts(self.count)
        here = (held[0], held[-1] + 1)
        first, width = self._width(place)
        gate_up, down = (2 * first, 2 * (first + width)), (first, first + width)
        source, order = f"{name}.experts", (0, 2, 1)
        shape = (self.count, hidden, 2 * self.width)
        yield Parameter(
            f"{target}.w13_weight", [Part(f"{source}.gate_up_proj", shape, (here, (0, hidden), gate_up), order)]
        )
        yield Parameter(
            f"{target}.w13_bias", [Part(f"{source}.gate_up_proj_bias", (self.count, 2 * self.width), (here, gate_up))]
        )
        shape = (self.count, self.width, hidden)
        yield Parameter(f"{target}.w2_weight", [Part(f"{source}.down_proj", shape, (here, down, (0, hidden)), order)])
        bias = Part(f"{source}.down_proj_bias", (self.count, hidden), (here, (0, hidden)))
        yield Parameter(f"{target}.w2_bias", [bias] if first == 0 else [], bias.numel)

    def _width(self, place: Place) -> tuple[int, int]:
        """First index and number of an expert's inner ones that this rank has: all with expert parallelism."""
        if place.mesh.ep > 1:
            return 0, self.width
        width = self.width // place.mesh.tp
        return place.tp_rank * width, width
