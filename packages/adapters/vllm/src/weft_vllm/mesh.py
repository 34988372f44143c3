"""Parallel sizes of vLLM engines, and where a rank stands in them.

Source: `vllm/distributed/parallel_state.py` (`initialize_model_parallel`: ranks count tensor parallelism fastest, then
pipeline stages, then data parallelism; experts spread over the tensor- and data-parallel ranks of one stage) and
`vllm/distributed/utils.py` (`get_pp_indices`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weft.errors import ConfigError

AXES = ("tp", "pp", "dp", "ep", "redundant", "replicas")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes by vLLM's own names, all of them known to factor.

    `ep` says that vLLM runs with `enable_expert_parallel`, and over how many ranks: always `tp · dp`. Without it every
    data-parallel rank is an engine of its own; with it all ranks share one forward pass. `replicas` is the number of
    such sets of engines, which know nothing of one another.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    redundant: int = 0
    """Further physical experts that hold copies of logical ones (`num_redundant_experts`)."""
    replicas: int = 1

    @classmethod
    def read(cls, parallel: Mapping[str, int]) -> Mesh:
        """From a mapping. Raises `ConfigError` for sizes that are unknown, not positive, or do not factor (trap 17)."""
        faults = [f"{name}={size}: sizes are at least 1" for name, size in parallel.items() if size < 1]
        faults += [f"{name}: vllm has {', '.join(AXES)}" for name in parallel if name not in AXES]
        mesh = cls(**{name: size for name, size in parallel.items() if name in AXES})
        spread = mesh.tp * mesh.dp
        if not faults and mesh.ep not in (1, spread):
            faults.append(
                f"ep {mesh.ep} is not tp {mesh.tp} · dp {mesh.dp} = {spread}: vLLM spreads experts over all ranks of a "
                f"stage; {mesh._remedy(spread)}"
            )
        if mesh.redundant and mesh.ep == 1:
            faults.append(f"redundant {mesh.redundant} without ep: only experts that are spread have copies")
        if faults:
            raise ConfigError("parallel sizes of a vllm engine: " + "; ".join(faults))
        return mesh

    def _remedy(self, spread: int) -> str:
        """What to write instead of an `ep` that is not `spread`."""
        if spread % self.ep == 0 and self.dp % (spread // self.ep) == 0:
            engines = spread // self.ep
            return f"say dp{self.dp // engines},ep{self.ep},replicas{self.replicas * engines} for {engines} engines"
        return f"say ep{spread}"

    @property
    def forward_ranks(self) -> int:
        """Ranks that share one forward pass: a replica of weft's."""
        return self.tp * self.pp * (self.dp if self.ep > 1 else 1)

    @property
    def forwards(self) -> int:
        """How many such replicas there are."""
        return self.replicas * (1 if self.ep > 1 else self.dp)

    @property
    def sequence_parallel_experts(self) -> bool:
        """Whether vLLM gives every tensor-parallel rank tokens of its own in layers of experts
        (`ParallelConfig.use_sequence_parallel_moe` with the default `all2all_backend`): some models then keep their
        shared experts whole.
        """
        return self.ep > 1 and self.tp > 1 and self.dp > 1

    def place(self, rank: int) -> Place:
        """Where a rank of a replica stands."""
        return Place(self, rank % self.tp, rank // self.tp % self.pp, rank // (self.tp * self.pp))


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's coordinates in its replica."""

    mesh: Mesh
    tp_rank: int
    pp_rank: int
    dp_rank: int

    @property
    def ep_rank(self) -> int:
        """Among the ranks over which experts are spread."""
        return self.dp_rank * self.mesh.tp + self.tp_rank

    @property
    def is_first(self) -> bool:
        """Whether this is a rank of the first pipeline stage."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is a rank of the last pipeline stage."""
        return self.pp_rank == self.mesh.pp - 1

    def layers(self, count: int) -> range:
        """This stage's of `count` layers: stages before the last, and at best not the first, take what is left over."""
        every, more = divmod(count, self.mesh.pp)
        sizes = [every] * self.mesh.pp
        for stage in range(2, more + 2):
            sizes[-stage] += 1
        first = sum(sizes[: self.pp_rank])
        return range(first, first + sizes[self.pp_rank])

    def experts(self, count: int) -> list[int]:
        """The logical experts that this rank holds, in the order of its memory.

        Consecutive physical ones, the first ranks one more when their number does not divide
        (`layers/fused_moe/expert_map_manager.py`); copies follow all logical ones
        (`EplbState.build_initial_global_physical_to_logical_map`).
        """
        if self.mesh.ep == 1:
            return list(range(count))
        every, more = divmod(count + self.mesh.redundant, self.mesh.ep)
        first = self.ep_rank * every + min(self.ep_rank, more)
        return [physical % count for physical in range(first, first + every + (self.ep_rank < more))]
