"""Layouts of vLLM ranks from a Hugging Face config and parallel sizes alone; vLLM need not be installed.

They equal what a live engine records (`weft_vllm.binding`), apart from the names of what it leaves out, when its
weights stay plain, as they do on GPUs and, but for experts, by default on CPU; what an engine packs it records as
scratch. What a family is made of is in `weft_vllm.families`, how sizes place a rank in `weft_vllm.mesh`, and what a
rank then holds in `weft_vllm.stack`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import ConfigError
from weft.layout import Layout
from weft.verification import Request, Verification
from weft_vllm.families import read_model
from weft_vllm.mesh import AXES, Mesh
from weft_vllm.model import Model
from weft_vllm.parameters import Writer
from weft_vllm.stack import build_layout, faults_of
from weft_vllm.verification import start_and_verify


def vllm_layout(
    hf_config: Mapping[str, Any], parallel: Mapping[str, int], rank: int, dtype: str = "bfloat16"
) -> Layout:
    """The layout of one rank of all engines together, with weights in `dtype`.

    `parallel` has the axes of `VllmAdapter`. Raises `NotSupportedError` for a family that is not mapped, `ConfigError`
    with every size that does not divide, or for a rank that is not there.
    """
    model, mesh = _checked(hf_config, parallel)
    ranks = mesh.forward_ranks * mesh.forwards
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank {rank} of a vllm engine: it has ranks 0 to {ranks - 1}")
    return build_layout(model, mesh.place(rank % mesh.forward_ranks), Writer(dtype))


@dataclass(frozen=True, slots=True)
class VllmAdapter:
    """Implements `weft.contracts.Adapter`; the axes are explained by `weft_vllm.mesh.Mesh`."""

    axes: tuple[str, ...] = AXES

    def world_size(self, parallel: Mapping[str, int]) -> int:
        """`tp · pp · dp · replicas`. Raises `ConfigError` for sizes that are unknown, not positive, or do not factor
        (trap 17).
        """
        mesh = Mesh.read(parallel)
        return mesh.forward_ranks * mesh.forwards

    def replicas(self, parallel: Mapping[str, int]) -> int:
        """`dp · replicas`, or with expert parallelism `replicas`."""
        return Mesh.read(parallel).forwards

    def layouts(self, config: Mapping[str, Any], parallel: Mapping[str, int], dtype: str) -> Sequence[Layout]:
        """The layout of every rank, replica after replica, one object for ranks that are equal. Raises
        `NotSupportedError` for a family that is not mapped and `ConfigError` with every size that does not divide.
        """
        model, mesh = _checked(config, parallel)
        writer = Writer(dtype)
        return [build_layout(model, mesh.place(rank), writer) for rank in range(mesh.forward_ranks)] * mesh.forwards

    def verify(self, request: Request, report: Callable[[str], None]) -> Verification:
        """Implements `weft.verification.Verifier`: `weft verify vllm:tp2`. Raises what `start_and_verify` raises."""
        return start_and_verify(request, report)


def _checked(config: Mapping[str, Any], parallel: Mapping[str, int]) -> tuple[Model, Mesh]:
    model, mesh = read_model(config), Mesh.read(parallel)
    faults = faults_of(model, mesh)
    if faults:
        raise ConfigError(f"{model.family} does not divide: " + "; ".join(faults))
    return model, mesh


adapter = VllmAdapter()
