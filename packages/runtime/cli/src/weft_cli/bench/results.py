"""Figures of planners, as they are printed and saved."""

from __future__ import annotations

import msgspec


class PlannerRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one case."""

    case: str
    source: str
    target: str
    source_ranks: int
    target_ranks: int
    logical_tensors: int
    copies: int
    segments: int
    bytes: int
    cross_host_bytes: int
    """Those of them that move between hosts, of 8 ranks each."""
    once_per_host_bytes: int
    """What would move between hosts if every box came once to each host that wants it."""
    between_replicas_bytes: int
    """What replicas pass on to each other."""
    busiest_source_bytes: int
    """What the busiest source sends."""
    busiest_relay_bytes: int
    """What the busiest target passes on."""
    busiest_target_bytes: int
    """What the busiest target takes."""
    distinct_layouts: int
    decode_seconds: float
    """Every distinct layout from its record."""
    plan_seconds: float
    """The global plan with coalescing, balance and proof of coverage, its statistics included."""
    slices_seconds: float
    """Every member's slice of the plan, made and encoded by the one member that plans."""
    rank_plan_seconds: float
    """One member's slice, read from its record and proven against its own layouts: the slowest of the longest few."""
    calibration_sort_seconds: float
    """numpy's sort of 2²² random 64-bit integers in the same process."""
    rss_before_bytes: int
    """Most memory before planning: interpreter, imports, layouts."""
    peak_rss_bytes: int
    """Most memory at once, all of that included."""
    egress_max_over_mean: float
    egress_over_bound: float
    ingress_over_bound: float
    peers_per_rank_max: int
    bytes_per_member_read: int
    """The record of a member's slice, the longest of all: all that it reads of the plan and of others' layouts."""
    bytes_planner_read: int
    """The records of all distinct layouts."""
    bytes_planner_published: int
    """The records of all slices, one store operation each."""


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """What one planner made of a case."""

    seconds: float
    memory_bytes: int
    """Most memory while it planned, above what there was before; its input was there before."""
    operations: int
    """Messages that are sent: Megatron's send operations, weft's buckets."""
    operations_busiest: int
    """Those of the source rank that sends most of them."""
    bytes: int
    """Padding of vocabularies included by Megatron, which moves it."""
    egress_max_over_mean: float
    """Bytes of the busiest source rank over the mean of all."""


class BesideRow(msgspec.Struct, frozen=True, kw_only=True):
    """Both planners on one case, in one run."""

    case: str
    source: str
    target: str
    source_ranks: int
    target_ranks: int
    weft: Planned
    weft_copies: int
    weft_segments: int
    megatron: Planned
    megatron_version: str
    ratios: dict[str, float]
    """Megatron's figure over weft's: `seconds`, `memory`, `operations`, `operations_busiest`, `balance`."""
