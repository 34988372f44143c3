"""Megatron's parallel sizes and rank order, as `megatron/core/parallel_state.py` defines them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from weft.errors import ConfigError

AXES = ("tp", "pp", "cp", "dp", "ep", "etp", "vpp", "first", "last", "mtp")
"""Tensor, pipeline, context, data, expert and expert-tensor parallel size; chunks per pipeline stage (virtual pipeline
parallelism), layers in the first and in the last stage where it has others than the rest, and layers of multi-token
prediction, which Megatron has none of unless told.
"""
DEFAULT_ORDER = "tp-cp-ep-dp-pp"
"""Default of `initialize_model_parallel(order=...)`: the first axis varies fastest with the rank."""
_RANKED = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands in the mesh, and in the one that divides experts among the same ranks."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    """Which experts it has."""
    etp: int
    """Which part of each of them."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """The parallel sizes of a job. Ranks are `tp·pp·cp·dp`; expert axes divide the same ranks again."""

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int
    etp: int
    order: str = DEFAULT_ORDER
    vpp: int = 1
    first: int | None = None
    last: int | None = None
    mtp: int = 0

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int], order: str = DEFAULT_ORDER) -> Mesh:
        """Check sizes by Megatron's flag names; absent ones are 1, absent `etp` is `tp` as in Megatron.

        Raises `ConfigError` with every unknown axis, size below 1, and sizes that do not factor (trap 17).
        """
        faults = [f"unknown axis {name!r}, expected {', '.join(AXES)}" for name in sizes if name not in AXES]
        faults += [f"{name}={size}, expected at least 1" for name, size in sizes.items() if size < 1]
        given = [name for name in order.split("-") if name]
        ordered = (*_RANKED, "ep")
        faults += [f"unknown axis {name!r} in order {order!r}" for name in given if name not in ordered]
        absent = [name for name in ordered if name not in given and sizes.get(name, 1) > 1]
        faults += [f"axis {name} is missing from order {order!r}" for name in absent]
        faults += [f"axis {name} comes twice in order {order!r}" for name in set(given) if given.count(name) > 1]
        if faults:
            raise ConfigError(f"parallel sizes: {'; '.join(faults)}")
        tp, pp, cp, dp, ep = (int(sizes.get(name, 1)) for name in ("tp", "pp", "cp", "dp", "ep"))
        rest = {name: int(sizes[name]) for name in ("vpp", "first", "last", "mtp") if name in sizes}
        mesh = cls(tp, pp, cp, dp, ep, int(sizes.get("etp", tp)), order, **rest)
        if mesh.world % (mesh.ep * mesh.etp * mesh.pp):
            raise ConfigError(
                f"parallel sizes: {mesh.world} ranks (tp {tp} x pp {pp} x cp {cp} x dp {dp}) do not divide into "
                f"etp {mesh.etp} x ep {mesh.ep} x pp {pp} = {mesh.ep * mesh.etp * mesh.pp}"
            )
        lacking = [name for name, size in mesh._expert_sizes.items() if size > 1 and name not in given]
        if lacking:
            raise ConfigError(f"parallel sizes: axis {', '.join(lacking)} is missing from order {order!r}")
        if not mesh._same_stages():
            raise ConfigError(
                f"parallel sizes: in order {order!r} experts (etp {mesh.etp} x ep {mesh.ep} x dp "
                f"{mesh._expert_sizes['dp']}) and the rest (tp {tp} x cp {cp} x dp {dp}) have different pipeline "
                "groups or data-parallel sizes; put pp last"
            )
        return mesh

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    def coordinates(self, rank: int) -> Coordinates:
        """Where a global rank stands (traps 2 and 12: never the rank modulo something)."""
        at, expert = (_place(rank, sizes, self.order) for sizes in (self._sizes, self._expert_sizes))
        return Coordinates(**at, ep=expert["ep"], etp=expert["tp"])

    @property
    def _sizes(self) -> dict[str, int]:
        """Of the axes that divide everything but experts."""
        return {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}

    @property
    def _expert_sizes(self) -> dict[str, int]:
        """Of the axes that divide experts, in the same order; context parallelism is data parallelism to them."""
        return {"tp": self.etp, "ep": self.ep, "dp": self.world // (self.etp * self.ep * self.pp), "pp": self.pp}

    def _same_stages(self) -> bool:
        """Whether experts and everything else have the same pipeline groups; Megatron refuses other orders."""
        if self.pp == 1 or self.order.endswith("pp"):
            return True
        sizes, expert_sizes = self._sizes, self._expert_sizes
        before = self.order.partition("pp")[0].split("-")
        strides = {math.prod(each.get(name, 1) for name in before) for each in (sizes, expert_sizes)}
        return len(strides) == 1 and sizes["dp"] == expert_sizes["dp"]


def _place(rank: int, sizes: Mapping[str, int], order: str) -> dict[str, int]:
    """Coordinates of a rank, as Megatron's `RankGenerator` counts; axes that the order leaves out have size 1."""
    at = dict.fromkeys(sizes, 0)
    for name in order.split("-"):
        if name in sizes:
            rank, at[name] = divmod(rank, sizes[name])
    return at


def padded_vocabulary(vocabulary: int, divisible_by: int, tp: int) -> int:
    """Rows after Megatron's padding to a multiple of `make_vocab_size_divisible_by` times the tensor-parallel size."""
    return math.ceil(vocabulary / (divisible_by * tp)) * divisible_by * tp
