"""What Transformers' plans of tensor and expert parallelism make of a model: how each parameter is cut.

Plans name modules or parameters, with `*` for numbers, and a style for each; the styles and their placements are those
of `transformers/distributed/tensor_parallel.py` (5.17 to 5.19), the split of FSDP that of torch's
`distributed/fsdp/_fully_shard/_fsdp_param.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from weft.errors import ConfigError, NotSupportedError
from weft_dtensor.mesh import Mesh, Place
from weft_dtensor.shards import Split

_COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
_ROWS = ("rowwise", "rowwise_rep", "rowwise_split_input", "embedding_rowwise")
_WHOLE = (
    "all_reduce", "ep_dispatch_experts", "ep_router", "megamoe_experts", "megamoe_router", "mla_kv_a_proj",
    "moe_identity_expert", "moe_tp_experts", "replicated_with_grad_allreduce", "sequence_parallel",
)  # fmt: skip
_GATHERED = ("colwise_gather_output", "colwise_rep")
_EXPERTS = "grouped_gemm"
_DISPATCH = "ep_dispatch_experts"
_STYLES = (*_COLUMNS, *_ROWS, *_WHOLE, "packed_colwise", "packed_rowwise", _EXPERTS)


@dataclass(frozen=True, slots=True)
class Cuts:
    """How the parameters of one model are cut over a mesh."""

    mesh: Mesh
    tp: Mapping[str, str]
    """Styles by generic name, without what `ep` names."""
    ep: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, mesh: Mesh) -> Cuts:
        """The plans of a Transformers model (`tp_plan`, `ep_plan`), those of them that the mesh has ranks for.

        Raises `NotSupportedError` for a model without such a plan and for styles that are not known here, `ConfigError`
        with every size that a style cannot divide.
        """
        plans = {axis: dict(getattr(model, f"{axis}_plan", None) or {}) for axis in ("tp", "ep")}
        faults = [
            f"{axis}={size}: {type(model).__name__} of the installed Transformers has no {axis}_plan"
            for axis, size in (("tp", mesh.tp), ("ep", mesh.ep))
            if size > 1 and not plans[axis]
        ]
        tp, ep = plans["tp"] if mesh.tp > 1 else {}, plans["ep"] if mesh.ep > 1 else {}
        tp = {name: style for name, style in tp.items() if not any(name == e or name.startswith(f"{e}.") for e in ep)}
        unknown = sorted({style for style in (*tp.values(), *ep.values()) if style not in _STYLES})
        if unknown:
            faults.append(f"styles {', '.join(unknown)} of its plans are not known; read the layout from a live module")
        if faults:
            raise NotSupportedError("; ".join(faults))
        cuts = cls(mesh, tp, ep)
        faults = cuts._size_faults(model)
        if faults:
            raise ConfigError("; ".join(faults))
        return cuts

    def splits(self, name: str, parameter: nn.Parameter, owner: nn.Module, place: Place) -> list[Split]:
        """How one rank's part of a parameter is cut out of the whole, in the order of its mesh dimensions."""
        model_parallel = [
            Split(axis, parts, index, before)
            for plan, parts, index in ((self.tp, self.mesh.tp, place.tp), (self.ep, self.mesh.ep, place.ep))
            for axis, before in _cut(_style(name, plan), parameter.ndim, isinstance(owner, nn.Embedding), name)
        ]
        before = math.prod(split.parts for split in model_parallel if split.axis == 0)
        holders = (name[: dot.start()] for dot in re.finditer(r"\.", name))
        if any(self.ep.get(_generic(holder)) == _DISPATCH for holder in holders):
            return [Split(0, self.mesh.expert_fsdp, place.expert_fsdp, before), *model_parallel]
        return [Split(0, self.mesh.fsdp, place.fsdp, before), *model_parallel]

    def _size_faults(self, model: nn.Module) -> list[str]:
        faults = []
        mesh = self.mesh
        if self.ep and _DISPATCH not in self.ep.values() and mesh.ep != mesh.tp:
            faults.append(f"ep={mesh.ep} with tp={mesh.tp}: its ep_plan has no {_DISPATCH}, so both must be equal")
        for name, parameter in model.named_parameters(remove_duplicate=False):
            rows = parameter.shape[-2] if parameter.ndim > 1 else parameter.shape[0]
            if _style(name, self.ep) == _EXPERTS and parameter.shape[0] % mesh.ep:
                faults.append(f"{name}: ep={mesh.ep} does not divide its {parameter.shape[0]} experts")
            if _style(name, self.tp) in _GATHERED and rows % mesh.tp:
                faults.append(f"{name}: tp={mesh.tp} does not divide its {rows} rows, whose outputs are gathered")
        return faults


def _cut(style: str | None, dimensions: int, embedding: bool, name: str) -> list[tuple[int, int]]:
    """(axis, packed parts that are cut one by one) where a style cuts a parameter."""
    if style in _COLUMNS:
        return [(1 if embedding else max(dimensions - 2, 0), 1)]
    if style in _ROWS:
        if embedding:
            return [(0, 1)]
        return [] if name.rpartition(".")[2] == "bias" else [(dimensions - 1, 1)]
    if style == "packed_colwise":
        return [(0, 1) if dimensions == 1 else (dimensions - 2, 2)]
    if style == "packed_rowwise":
        return [] if dimensions == 1 else [(dimensions - 1, 2)]
    return [(0, 1)] if style == _EXPERTS else []


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    """A parameter's own style, else that of its module."""
    generic = _generic(name)
    return plan.get(generic) or plan.get(generic.rpartition(".")[0])


def _generic(name: str) -> str:
    """A name with `*` for the numbers of layers, as in plans."""
    return re.sub(r"\.\d+(\.|$)", r".*\1", name)
