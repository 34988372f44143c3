"""What a plan costs: totals, balance, peers and segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from weft.copies import Loops, Parts, Routes
from weft.holders import DOMAIN, places
from weft.member import Member
from weft.table import Int64s, stable_order, unique_rows, volume


class Statistics(msgspec.Struct, frozen=True):
    """What a plan costs."""

    bytes: int
    """All bytes written into targets."""
    local_bytes: int
    """Those of them that stay within one member."""
    cross_host_bytes: int
    """Those of them that move between hosts."""
    cross_domain_bytes: int
    """Those of them that move between fabric domains."""
    between_replicas_bytes: int
    """What targets pass on to other replicas."""
    once_per_host_bytes: int
    """What would move between hosts if targets of one host passed each box on to each other: the gain of relays."""
    copies: int
    tensors: int
    segments: int
    """Contiguous byte ranges between two members, neighbours joined: the fewest that both sides' memory allows."""
    egress_bytes: dict[str, int]
    """Per source member."""
    ingress_bytes: dict[str, int]
    """Per target member."""
    relayed_bytes: dict[str, int]
    """Per target that passes on what it received."""
    egress_max_over_mean: float
    """The busiest source over the mean of all sources; 1.0 is perfect."""
    egress_over_bound: float
    """The busiest source over what geometry and the order of locality allow at best; 1.0 is optimal."""
    ingress_over_bound: float
    """The busiest receiver over what the neediest target wants; 1.0: no byte comes twice."""
    peers: dict[str, int]
    """Other members each one is connected to."""

    @property
    def busiest_bytes(self) -> int:
        """What the busiest member sends, or takes: at the speed of its link, no refit is faster."""
        return max(
            max(each.values(), default=0) for each in (self.egress_bytes, self.relayed_bytes, self.ingress_bytes)
        )


def statistics_of(
    members: Sequence[Member], tensors: int, parts: Parts, loops: Loops, routes: Routes, part_bytes: Int64s, bound: int
) -> Statistics:
    """Add up. `part_bytes` are bytes per part, `bound` those that the busiest sender sends in any plan."""
    count = len(members)
    egress, ingress, peers = (np.zeros(count, dtype=np.int64) for _ in range(3))
    domain = places(members)[DOMAIN]
    hosts: dict[str, list[int]] = {}
    for m, member in enumerate(members):
        hosts.setdefault(member.host, []).append(m)
    first_of_box, box = unique_rows(np.concatenate([parts.tensor[:, None], parts.lo, parts.hi], axis=1))
    box_bytes = part_bytes[first_of_box]
    starts = np.searchsorted(routes.target, np.arange(count + 1)).tolist()
    lengths = _Lengths.of(parts, loops)
    replica = np.unique([m.replica or m.name for m in members], return_inverse=True)[1]
    is_source = np.array([m.is_source for m in members])
    local = far = farther = chained = once = segments = 0
    for neighbours in hosts.values():
        elsewhere = np.ones(count, dtype=bool)
        elsewhere[neighbours] = False
        came = np.zeros(len(box_bytes), dtype=bool)
        for m in (m for m in neighbours if starts[m] < starts[m + 1]):  # one by one, so that the columns stay small
            source, part = (column[starts[m] : starts[m + 1]] for column in (routes.source, routes.part))
            size = part_bytes[part]
            np.add.at(egress, source, size)
            ingress[m] = size.sum()
            senders = np.unique(source)
            senders = senders[senders != m]
            peers[senders] += 1
            peers[m] += len(senders)
            away = elsewhere[source]
            local, far = local + int(size[source == m].sum()), far + int(size[away].sum())
            farther += int(size[domain[source] != domain[m]].sum())
            chained += int(size[(replica[source] != replica[m]) & ~is_source[source]].sum())
            came[box[part[away]]] = True
            order = stable_order(source, count)
            segments += lengths.segments(part[order], source[order])
        once += int(box_bytes[came].sum())
    mean, busiest = (egress[is_source].mean(), int(egress[is_source].max())) if is_source.any() else (0.0, 0)
    return Statistics(
        bytes=int(ingress.sum()), local_bytes=local, cross_host_bytes=far, cross_domain_bytes=farther,
        between_replicas_bytes=chained, once_per_host_bytes=once, copies=len(routes), tensors=tensors,
        segments=segments,
        egress_bytes={m.name: int(n) for m, n in zip(members, egress, strict=True) if m.is_source},
        ingress_bytes={m.name: int(n) for m, n in zip(members, ingress, strict=True) if m.is_target},
        relayed_bytes={m.name: int(n) for m, n in zip(members, egress, strict=True) if n and not m.is_source},
        egress_max_over_mean=float(busiest / mean) if mean else 1.0,
        egress_over_bound=busiest / bound if bound else 1.0,
        ingress_over_bound=1.0,  # every element comes once: that is proven before there is a plan
        peers={m.name: int(n) for m, n in zip(members, peers, strict=True)},
    )  # fmt: skip


def run_elements(sizes: Int64s, source_strides: Int64s, target_strides: Int64s) -> Int64s:
    """Elements per run that is contiguous in both buffers, per loop nest: innermost axes that follow each other densely
    are one run, whatever they are in the logical tensor.
    """
    run = np.ones(len(sizes), dtype=np.int64)
    dense = np.ones(len(sizes), dtype=bool)
    for axis in range(sizes.shape[1] - 1, -1, -1):
        size = sizes[:, axis]
        dense &= (size == 1) | ((source_strides[:, axis] == run) & (target_strides[:, axis] == run))
        run *= np.where(dense, size, 1)
    return run


@dataclass(frozen=True, slots=True)
class _Lengths:
    """What says whether one part goes on where another ends."""

    parts: Parts
    loops: Loops
    run: Int64s
    """Elements per run."""
    runs: Int64s
    source_end: Int64s
    target_end: Int64s
    """Behind the last element of the part."""

    @classmethod
    def of(cls, parts: Parts, loops: Loops) -> _Lengths:
        run = run_elements(loops.sizes, loops.source_strides, loops.target_strides)
        return cls(
            parts, loops, run, volume(np.zeros_like(loops.sizes), loops.sizes) // run,
            parts.source_offset + ((loops.sizes - 1) * loops.source_strides).sum(axis=1) + 1,
            parts.target_offset + ((loops.sizes - 1) * loops.target_strides).sum(axis=1) + 1,
        )  # fmt: skip

    def segments(self, part: Int64s, source: Int64s) -> int:
        """Runs of copies to one member, in the order of its memory per source, less those that continue one of the copy
        before them from the same source.
        """
        parts, loops = self.parts, self.loops
        near = np.flatnonzero(
            (source[1:] == source[:-1]) & (parts.target_buffer[part[1:]] == parts.target_buffer[part[:-1]])
        )
        here, there = part[near], part[near + 1]
        near = parts.source_buffer[here] == parts.source_buffer[there]
        from_offset, to_offset = parts.source_offset[there], parts.target_offset[there]
        end = near & (self.source_end[here] == from_offset) & (self.target_end[here] == to_offset)
        next_run = near & (self.runs[here] == self.runs[there])
        next_run &= parts.source_offset[here] + self.run[here] == from_offset
        next_run &= parts.target_offset[here] + self.run[here] == to_offset
        for outer in (loops.sizes, loops.source_strides, loops.target_strides):
            next_run &= (outer[here, :-1] == outer[there, :-1]).all(axis=1)
        return int(self.runs[part].sum() - np.where(next_run, self.runs[here], end).sum())
