"""From two sides and a model to a plan and its figures. No output here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from weft.contracts import Adapter
from weft.layout import ITEM_BYTES, Layout
from weft.lower import Binding, lower, segments
from weft.member import Member
from weft.plan import Plan, plan
from weft.plugins import load
from weft.policy import Policy
from weft_cli.sides import Side, check_axes

Report = Callable[[str], None]


class Sides(msgspec.Struct, frozen=True):
    """All members of both sides, and every layout by its address."""

    sources: list[Member]
    targets: list[Member]
    layouts: dict[str, Layout]


class Figures(msgspec.Struct, frozen=True):
    """What a plan costs, summed over members."""

    fingerprint: str
    sources: int
    targets: int
    replicas: int
    tensors: int
    bytes: int
    """Written into targets in one refit."""
    local_bytes: int
    """Those of them that stay within one member."""
    copies: int
    segments: int
    """Contiguous byte ranges; a packed bucket is one."""
    buckets: int
    packed_buckets: int
    """Buckets that pass through staging because their runs are short."""
    busiest_over_mean: float
    """Bytes of the busiest sender over the mean of all sources; 1.0 is perfect."""
    most_peers: int
    egress_bytes: dict[str, int]
    ingress_bytes: dict[str, int]
    peers: dict[str, int]


def members_of(
    config: Mapping[str, Any], source: Side, target: Side, dtypes: tuple[str, str], ranks_per_host: int, report: Report
) -> Sides:
    """Describe both sides by their adapters, without the frameworks running; sources and targets sit on hosts of their
    own.

    `dtypes` are the source's and the target's. Raises `ConfigError` for sizes that do not factor, `NotSupportedError`
    for what an adapter cannot describe, `PluginError` for an adapter that is not installed.
    """
    layouts: dict[str, Layout] = {}

    def ranks(side: Side, dtype: str, label: str) -> tuple[list[Layout], int]:
        adapter: Adapter = load("weft.adapters", side.framework)
        check_axes(side, tuple(adapter.axes))
        world = adapter.world_size(side.parallel)
        report(f"describing {world} {label} ranks of {side.framework}")
        found = list(adapter.layouts(config, side.parallel, dtype))
        layouts.update({layout.address: layout for layout in found})
        return found, adapter.replicas(side.parallel)

    def member(name: str, rank: int, label: str, **rest: Any) -> Member:
        host = f"{label}-host{rank // ranks_per_host}"
        return Member(name=name, host=host, domain=host, device=f"cuda:{rank % ranks_per_host}", **rest)

    held, _ = ranks(source, dtypes[0], "source")
    wanted, replicas = ranks(target, dtypes[1], "target")
    size = len(wanted) // replicas
    sources = [
        member(
            f"trainer/{rank}",
            rank,
            "trainer",
            source_layout=layout.address,
            target_layout=None,
            replica=None,
            replica_size=0,
        )
        for rank, layout in enumerate(held)
    ]
    targets = [
        member(
            f"rollout{rank // size}/{rank % size}", rank, "rollout",
            source_layout=None, target_layout=layout.address, replica=f"rollout{rank // size}", replica_size=size,
        )
        for rank, layout in enumerate(wanted)
    ]  # fmt: skip
    return Sides(sources, targets, layouts)


def make_plan(sides: Sides, policy: Policy) -> Plan:
    """`weft.plan`. Raises `PlanError` with every fault."""
    return plan(sides.sources, sides.targets, sides.layouts, policy)


def figures(made: Plan, sides: Sides, report: Report) -> Figures:
    """Lower the plan for every source, and add up."""
    statistics = made.statistics
    width = np.array([ITEM_BYTES[tensor.target_dtype] for tensor in made.tensors], dtype=np.int64)
    layout_of = {
        member.name: sides.layouts[member.target_layout] for member in sides.targets if member.target_layout is not None
    }
    runs = buckets = packed = 0
    for number, member in enumerate(sides.sources):
        report(f"lowering for source {number + 1} of {len(sides.sources)}")
        program = lower(made, sides.layouts, member.name)
        mine = _own_regions(sides.layouts[member.source_layout or ""])
        for bucket in program.sends:
            buckets += 1
            if bucket.slot is None:
                theirs = _own_regions(layout_of[bucket.peer])
                runs += len(segments(bucket.copies, width[bucket.copies.tensor], mine, theirs, True))
            else:
                packed += 1
                runs += 1
    return Figures(
        fingerprint=made.fingerprint,
        sources=len(sides.sources),
        targets=len(sides.targets),
        replicas=len({member.replica for member in sides.targets}),
        tensors=statistics.tensors,
        bytes=statistics.bytes,
        local_bytes=statistics.local_bytes,
        copies=statistics.copies,
        segments=runs,
        buckets=buckets,
        packed_buckets=packed,
        busiest_over_mean=statistics.egress_max_over_mean,
        most_peers=max(statistics.peers.values()),
        egress_bytes=statistics.egress_bytes,
        ingress_bytes=statistics.ingress_bytes,
        peers=statistics.peers,
    )


def _own_regions(layout: Layout) -> Binding:
    """Every buffer a region of its own: what a live rank's allocations come to, as a rule."""
    count = len(layout.buffers)
    return Binding(np.arange(count, dtype=np.int64), np.zeros(count, dtype=np.int64))
