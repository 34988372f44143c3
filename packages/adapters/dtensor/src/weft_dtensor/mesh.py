"""The device meshes of a job under FSDP2, tensor and expert parallelism, as Transformers lays them over its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weft.errors import ConfigError

AXES = ("replicate", "fsdp", "tp", "ep")
"""Size of the mesh dimension that replicates (HSDP), of the one that shards (FSDP2), of tensor and of expert
parallelism; `ep` divides the same ranks again.
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank stands; replicas of HSDP stand in one place."""

    fsdp: int
    tp: int
    expert_fsdp: int
    ep: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks are (replicate, fsdp, tp), row-major; for experts they are (replicate, fsdp·tp / ep, ep)
    (`transformers/distributed/utils.py`, `initialize_distributed_mesh`).
    """

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1

    @classmethod
    def read(cls, parallel: Mapping[str, int]) -> Mesh:
        """Check sizes by name; absent ones are 1. Raises `ConfigError` with every unknown axis and size below 1, or for
        an `ep` that does not factor (trap 17).
        """
        faults = [f"unknown axis {name!r}, expected {', '.join(AXES)}" for name in parallel if name not in AXES]
        faults += [f"{name}={size}, expected at least 1" for name, size in parallel.items() if size < 1]
        if faults:
            raise ConfigError(f"mesh sizes: {'; '.join(faults)}")
        mesh = cls(**parallel)
        shards = mesh.fsdp * mesh.tp
        if mesh.ep > 1 and (mesh.ep % mesh.tp or shards % mesh.ep):
            fitting = [str(ep) for ep in range(mesh.tp, shards + 1, mesh.tp) if shards % ep == 0]
            raise ConfigError(
                f"mesh sizes: ep={mesh.ep} does not factor with fsdp={mesh.fsdp} and tp={mesh.tp}: it must divide "
                f"fsdp·tp = {shards} and be a multiple of tp; of these sizes: ep={' or '.join(fitting)}"
            )
        return mesh

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.replicate * self.fsdp * self.tp

    @property
    def expert_fsdp(self) -> int:
        """How many ranks of a replica share the same experts, sharded by FSDP."""
        return self.fsdp * self.tp // self.ep

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        inner = rank % (self.fsdp * self.tp)
        return Place(inner // self.tp, inner % self.tp, inner // self.ep, inner % self.ep)
