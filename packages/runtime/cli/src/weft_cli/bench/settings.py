"""What is measured, as every process of a benchmark is told, and what it answers."""

from __future__ import annotations

from typing import Any

import msgspec

from weft.policy import Policy


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark case."""

    name: str
    config: dict[str, Any]
    """Hugging Face config."""
    source: tuple[str, dict[str, int]]
    """Adapter and parallel sizes."""
    target: tuple[str, dict[str, int]]
    transport: str
    transport_options: dict[str, Any]
    policy: Policy
    beside: Policy | None = None
    """Refits with this policy too, in turn with the others, in the same processes."""
    beside_options: dict[str, Any] = {}
    """Their transport's."""
    environment: dict[str, str] = {}
    """Set in every process before it loads a network's library."""
    collocated: bool = False
    """Whether a rank of the source and the target's of the same number are one process."""
    reuse: bool = True
    """False joins anew for every version."""
    tensor_by_tensor: bool = False
    """Whether the plan's copies are also sent one by one over gloo, in turn with the refits."""
    beside_megatron: bool = False
    """Whether Megatron-Core's own gloo refit runs too, in turn with the others; for a collocated case of Megatron's."""
    cycles: int
    """Refits; the first one is cold."""
    dtype: str
    seconds: float
    """Deadline of every stage."""


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """Which process of a case this is."""

    name: str
    source: int | None
    """Its rank among the sources, or None."""
    target: int | None


class MemberResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one member measured. Lists have an entry per cycle, unless they say otherwise."""

    name: str
    bytes: int
    """Bytes that one refit wrote here; 0 of a mere source."""
    joins: list[dict[str, float]]
    """Seconds of joining before that cycle by phase: `allocate`, `register`, `join` (the rest); empty where none was.
    """
    refits: list[dict[str, float]]
    """`weft.report.Report.seconds`."""
    pauses: list[float]
    """Seconds for which a target's weights could not be served; empty of a mere source."""
    beside_pauses: list[float]
    beside_seconds: list[float]
    """Of the refits with the other policy; empty without one."""
    bare_bytes: int
    """Bytes of one bare transfer that this member sent."""
    bare_seconds: dict[int, list[float]]
    """Per chunk size in bytes, the bare transfers; empty where there are none."""
    tensor_by_tensor_seconds: list[float]
    megatron_seconds: list[float]
    """Of Megatron-Core's own refits; empty without them."""
    registrations: list[int]
    allocations: list[int]
    store_operations: list[int]
    extra_peak_bytes: int
    """Staging, and the most resident memory during any refit above what the member had when it had joined."""
    wrong_bytes: int
    """Bytes of a target that are not what an independent slice of the logical tensors gives, after the last refit."""

    def total(self, cycle: int) -> float:
        """Seconds of a cycle, joining included only where every cycle joins."""
        refit = self.refits[cycle]["total"]
        return refit + sum(self.joins[cycle].values()) if all(self.joins) else refit
