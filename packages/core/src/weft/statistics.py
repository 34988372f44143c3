"""What a plan costs: totals, balance, peers and segments."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from weft.copies import Loops, Parts, Routes
from weft.member import Member
from weft.table import Int64s, distinct, first_of_each, stable_order, unique_rows, volume


class Statistics(msgspec.Struct, frozen=True):
    """What a plan costs."""

    bytes: int
    """All bytes written into targets."""
    local_bytes: int
    """Those of them that stay within one member."""
    cross_host_bytes: int
    """Those of them that move between hosts."""
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


def statistics_of(
    members: Sequence[Member], tensors: int, parts: Parts, loops: Loops, routes: Routes, part_bytes: Int64s, bound: int
) -> Statistics:
    """Add up. `part_bytes` are bytes per part, `bound` those that the busiest sender sends in any plan."""
    count, size = len(members), part_bytes[routes.part]
    egress, ingress = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    np.add.at(egress, routes.source, size)
    np.add.at(ingress, routes.target, size)
    pairs, _ = distinct(routes.source * count + routes.target, count * count)
    pairs = pairs[pairs // count != pairs % count]
    peers = np.bincount(np.concatenate([pairs // count, pairs % count]), minlength=count)
    sources = np.array([m.is_source for m in members])
    mean, busiest = (egress[sources].mean(), int(egress[sources].max())) if sources.any() else (0.0, 0)
    hosts: dict[str, int] = {}
    host = np.array([hosts.setdefault(member.host, len(hosts)) for member in members], dtype=np.int64)
    far = np.flatnonzero(host[routes.source] != host[routes.target])
    _, box = unique_rows(np.concatenate([parts.tensor[:, None], parts.lo, parts.hi], axis=1))
    once = first_of_each(box[routes.part[far]] * len(hosts) + host[routes.target[far]], len(box) * len(hosts))
    most, needed = int(ingress.max(initial=0)), _needed(routes, part_bytes, count)
    return Statistics(
        bytes=int(size.sum()), local_bytes=int(size[routes.source == routes.target].sum()),
        cross_host_bytes=int(size[far].sum()), once_per_host_bytes=int(size[far][once].sum()), copies=len(routes),
        tensors=tensors, segments=_segments(parts, loops, routes, count),
        egress_bytes={m.name: int(n) for m, n in zip(members, egress, strict=True) if m.is_source},
        ingress_bytes={m.name: int(n) for m, n in zip(members, ingress, strict=True) if m.is_target},
        relayed_bytes={m.name: int(n) for m, n in zip(members, egress, strict=True) if n and not m.is_source},
        egress_max_over_mean=float(busiest / mean) if mean else 1.0,
        egress_over_bound=busiest / bound if bound else 1.0,
        ingress_over_bound=most / needed if needed else 1.0,
        peers={m.name: int(n) for m, n in zip(members, peers, strict=True)},
    )  # fmt: skip


def _needed(routes: Routes, part_bytes: Int64s, count: int) -> int:
    """Bytes that the neediest target must receive: all it gets, since nothing is sent to it twice."""
    needed = np.zeros(count, dtype=np.int64)
    np.add.at(needed, routes.target, part_bytes[routes.part])
    return int(needed.max(initial=0))


def run_elements(sizes: Int64s, source_strides: Int64s, target_strides: Int64s) -> Int64s:
    """Elements per run that is contiguous in both buffers, per loop nest."""
    if not sizes.shape[1]:
        return np.ones(len(sizes), dtype=np.int64)  # scalars only
    dense = (source_strides[:, -1] == 1) & (target_strides[:, -1] == 1)
    return np.where(dense, sizes[:, -1], 1)


def _segments(parts: Parts, loops: Loops, routes: Routes, count: int) -> int:
    """Runs of all copies, less those that continue one of the copy before them between the same two members."""
    run = run_elements(loops.sizes, loops.source_strides, loops.target_strides)
    runs = volume(np.zeros_like(loops.sizes), loops.sizes) // run
    pair = routes.source * count + routes.target
    order = stable_order(pair, count * count)
    pair, part = pair[order], routes.part[order]
    here, there = part[:-1], part[1:]
    near = pair[1:] == pair[:-1]
    for column in (parts.source_buffer, parts.target_buffer):
        near &= column[here] == column[there]
    end = next_run = near
    for offset, strides in (
        (parts.source_offset, loops.source_strides), (parts.target_offset, loops.target_strides)
    ):  # fmt: skip
        last = offset + ((loops.sizes - 1) * strides).sum(axis=1)
        end = end & (last[here] + 1 == offset[there])
        next_run = next_run & (offset[here] + run[here] == offset[there]) & (runs[here] == runs[there])
        next_run &= (strides[here, :-1] == strides[there, :-1]).all(axis=1)
    next_run &= (loops.sizes[here, :-1] == loops.sizes[there, :-1]).all(axis=1)
    return int(runs[part].sum() - np.where(next_run, runs[here], end).sum())
