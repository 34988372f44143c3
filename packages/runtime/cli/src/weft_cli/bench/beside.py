"""weft's planner and Megatron's on the same cases, in one run, each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec

from weft.errors import ConfigError
from weft.lower import lower
from weft.policy import Policy
from weft.slices import slice_of
from weft_cli.bench.isolated import in_own_process, rss_bytes
from weft_cli.bench.megatron_planner import Sizes, megatron_version, run_megatron
from weft_cli.bench.planner import Described, PlannerCase, describe_apart, read_sides, timed
from weft_cli.bench.results import BesideRow, Planned
from weft_cli.planning import make_plan

DIRECT_RUN_BYTES = 16 << 10
"""NIXL's: shorter runs are packed, many to a message, as Megatron packs each operation."""


def run_beside(model: str, config: Mapping[str, Any], ranks: int, seconds: float) -> BesideRow:
    """Both planners from `ranks` training ranks to half as many, experts undivided there and cut by tensors here.

    Raises `ConfigError` without megatron-core or for a number of ranks that does not divide, `DeadlineError`, and what
    planning raises.
    """
    found = megatron_version()
    if ranks < 64 or ranks % 64:
        raise ConfigError(f"ranks is {ranks}; the case needs a multiple of 64 (pp 4 x ep 16)")
    held, wanted = Sizes(2, 4, ranks // 8, 16, 1), Sizes(4, 1, ranks // 8, 1, 4)
    case = PlannerCase(f"{model}, {ranks} ranks", model, f"megatron:{held}", f"megatron:{wanted}")
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        described = describe_apart(case, config, folder, seconds)
        ours, copies, segments = msgspec.msgpack.decode(
            in_own_process(_weft, msgspec.msgpack.encode(described), seconds), type=tuple[Planned, int, int]
        )
    argument = msgspec.msgpack.encode((config, held, wanted))
    theirs = msgspec.msgpack.decode(in_own_process(_megatron, argument, seconds), type=Planned)
    return BesideRow(
        case=case.name,
        source=case.source,
        target=case.target,
        source_ranks=held.world,
        target_ranks=wanted.world,
        weft=ours,
        weft_copies=copies,
        weft_segments=segments,
        megatron=theirs,
        megatron_version=found,
        ratios={
            "seconds": theirs.seconds / ours.seconds,
            "memory": theirs.memory_bytes / ours.memory_bytes,
            "operations": theirs.operations / ours.operations,
            "operations_busiest": theirs.operations_busiest / ours.operations_busiest,
            "balance": theirs.egress_max_over_mean / ours.egress_max_over_mean,
        },
    )


def _weft(argument: bytes) -> bytes:
    _, sides = read_sides(msgspec.msgpack.decode(argument, type=Described))
    before, _ = rss_bytes()
    seconds, made = timed(partial(make_plan, sides, Policy(direct_run_bytes=DIRECT_RUN_BYTES)))
    _, peak = rss_bytes()
    sends = [len(lower(slice_of(made, member.name)).sends) for member in sides.sources]
    statistics = made.statistics
    planned = Planned(
        seconds=seconds,
        memory_bytes=peak - before,
        operations=sum(sends),
        operations_busiest=max(sends),
        bytes=statistics.bytes,
        egress_max_over_mean=statistics.egress_max_over_mean,
    )
    return msgspec.msgpack.encode((planned, statistics.copies, statistics.segments))


def _megatron(argument: bytes) -> bytes:
    config, held, wanted = msgspec.msgpack.decode(argument, type=tuple[dict[str, Any], Sizes, Sizes])
    return msgspec.msgpack.encode(run_megatron(config, held, wanted))
