"""What a plan costs: traffic, balance, what is packed and why, and the memory that landing takes. No output here."""

from __future__ import annotations

import msgspec
import numpy as np

from weft.layout import ITEM_BYTES, Kind, Layout
from weft.lower import ALIGNMENT, SLOTS, staging_slot_bytes
from weft.plan import Plan
from weft.statistics import run_elements
from weft.table import Int64s
from weft_cli.planning import Sides


class Packed(msgspec.Struct, frozen=True):
    """Copies that pass through staging for one reason."""

    reason: str
    copies: int
    bytes: int


class Memory(msgspec.Struct, frozen=True):
    """What weft allocates on one member beside the weights, once, in bytes."""

    scratch: int
    """Arena in which groups land that the engine turns into a format of its own."""
    staging_in: int
    staging_out: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.scratch + self.staging_in + self.staging_out


class Figures(msgspec.Struct, frozen=True):
    """What a plan costs."""

    fingerprint: str
    sources: int
    targets: int
    replicas: int
    tensors: int
    bytes: int
    """Written into targets in one refit."""
    local_bytes: int
    """Those of them that stay within one member."""
    cross_host_bytes: int
    """Those of them that move between hosts."""
    cross_domain_bytes: int
    """Those of them that move between fabric domains."""
    between_replicas_bytes: int
    """What replicas pass on to each other."""
    once_per_host_bytes: int
    """What would move between hosts if every box came once to each host that wants it."""
    copies: int
    segments: int
    """Contiguous byte ranges between members, neighbours joined."""
    busiest_over_mean: float
    """Bytes of the busiest sender over the mean of all sources; 1.0 is perfect."""
    egress_over_bound: float
    """The busiest sender over what geometry and the order of locality allow at best."""
    ingress_over_bound: float
    """The busiest receiver over what the neediest target wants."""
    most_peers: int
    packed: list[Packed]
    """Copies between members that do not go straight between final buffers; every reason, most bytes first."""
    egress_bytes: dict[str, int]
    ingress_bytes: dict[str, int]
    relayed_bytes: dict[str, int]
    """Of targets that pass on what they received."""
    peers: dict[str, int]
    memory: dict[str, Memory]
    """Predicted per member."""


def figures(made: Plan, sides: Sides) -> Figures:
    """Add up. Raises `ConfigError` when the staging budget is too small for the plan's peers."""
    statistics = made.statistics
    packed = _packed_routes(made)
    return Figures(
        fingerprint=made.fingerprint,
        sources=len(sides.sources),
        targets=len(sides.targets),
        replicas=len({member.replica for member in sides.targets}),
        tensors=statistics.tensors,
        bytes=statistics.bytes,
        local_bytes=statistics.local_bytes,
        cross_host_bytes=statistics.cross_host_bytes,
        cross_domain_bytes=statistics.cross_domain_bytes,
        between_replicas_bytes=statistics.between_replicas_bytes,
        once_per_host_bytes=statistics.once_per_host_bytes,
        copies=statistics.copies,
        segments=statistics.segments,
        busiest_over_mean=statistics.egress_max_over_mean,
        egress_over_bound=statistics.egress_over_bound,
        ingress_over_bound=statistics.ingress_over_bound,
        most_peers=max(statistics.peers.values()),
        packed=_reasons(made, packed),
        egress_bytes=statistics.egress_bytes,
        ingress_bytes=statistics.ingress_bytes,
        relayed_bytes=statistics.relayed_bytes,
        peers=statistics.peers,
        memory=_memory(made, sides, packed),
    )


def _run_bytes(made: Plan) -> Int64s:
    """Bytes per run that is contiguous on both sides, per part."""
    loops = made.loops
    run: Int64s = run_elements(loops.sizes, loops.source_strides, loops.target_strides)
    return run * made.item_bytes[made.parts.tensor]


def _packed_routes(made: Plan) -> Int64s:
    """Routes between two members that `weft.lower` sends through staging."""
    casts = np.array([tensor.source_dtype != tensor.target_dtype for tensor in made.tensors])
    packed = casts[made.parts.tensor] | (_run_bytes(made) < made.policy.direct_run_bytes)
    return np.flatnonzero(packed[made.routes.part] & (made.routes.source != made.routes.target))


def _reasons(made: Plan, packed: Int64s) -> list[Packed]:
    dtypes = [(tensor.source_dtype, tensor.target_dtype) for tensor in made.tensors]
    kinds = sorted(set(dtypes))
    kind = np.array([kinds.index(pair) for pair in dtypes], dtype=np.int64)[made.parts.tensor]
    part = made.routes.part[packed]
    run, nbytes = _run_bytes(made), made.copy_bytes[packed]
    found = []
    for number, (source, target) in enumerate(kinds):
        mine = kind[part] == number
        if mine.any() and source != target:
            reason = f"cast from {source} to {target}"
        elif mine.any():
            runs = run[part[mine]]
            reason = f"runs of {runs.min():,} to {runs.max():,} bytes, shorter than {made.policy.direct_run_bytes:,}"
        else:
            continue
        found.append(Packed(reason, int(mine.sum()), int(nbytes[mine].sum())))
    return sorted(found, key=lambda each: (-each.bytes, each.reason))


def _memory(made: Plan, sides: Sides, packed: Int64s) -> dict[str, Memory]:
    slots = SLOTS * staging_slot_bytes(made) if len(packed) else 0
    count = len(made.members)
    pairs = np.unique(made.routes.source[packed] * count + made.routes.target[packed])
    outgoing, incoming = (np.bincount(ends, minlength=count) * slots for ends in (pairs // count, pairs % count))
    arenas = {address: _arena_bytes(layout) for address, layout in sides.layouts.items()}
    return {
        member.name: Memory(arenas.get(member.target_layout or "", 0), int(incoming[n]), int(outgoing[n]))
        for n, member in enumerate(made.members)
    }


def _arena_bytes(layout: Layout) -> int:
    """Room for as many of the largest scratch group as there are slots, or groups if these are fewer."""
    groups: dict[int, int] = {}
    for buffer in layout.buffers:
        if buffer.kind is Kind.SCRATCH:
            nbytes = -(-buffer.numel * ITEM_BYTES[buffer.dtype] // ALIGNMENT) * ALIGNMENT
            groups[buffer.group] = groups.get(buffer.group, 0) + nbytes
    return max(groups.values(), default=0) * min(layout.scratch_slots, len(groups))
