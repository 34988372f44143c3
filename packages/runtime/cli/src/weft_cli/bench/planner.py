"""What planning costs and how good the plans are: cases of real sizes, each in processes of its own.

A first process describes the layouts and writes their records; the second reads them, as members of a job would, and
plans. So neither the adapters' time nor their memory is in the figures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from weft.layout import Layout
from weft.member import Member
from weft.plan import Plan
from weft.planfile import save_plan
from weft.policy import Policy
from weft.slices import Slice, prove, slice_of
from weft_cli.bench.isolated import in_own_process, rss_bytes
from weft_cli.bench.results import PlannerRow
from weft_cli.planning import Sides, make_plan, members_of
from weft_cli.sides import parse_side

_RANKS_PER_HOST = 8
_DTYPE = "bfloat16"
_PROVEN = 8
"""Members, those with the longest slices, that prove theirs."""
Result = TypeVar("Result")


class PlannerCase(msgspec.Struct, frozen=True):
    """A model that moves from one set of ranks to another."""

    name: str
    model: str
    """As for `weft plan --model`."""
    source: str
    target: str
    relay: str = "never"
    chain: str = "never"


CASES = (
    PlannerCase("qwen3-30b-a3b", "qwen3-30b-a3b", "megatron:tp2,pp2,dp16,ep32,etp1", "vllm:tp4,dp8,ep32"),
    PlannerCase("kimi-k2-tp1", "kimi-k2", "megatron:tp1,pp16,dp128,ep64", "vllm:dp128,ep128,replicas8"),
    PlannerCase("kimi-k2-tp2", "kimi-k2", "megatron:tp2,pp16,dp64,ep32,etp1", "vllm:tp8,dp16,ep128,replicas8"),
    PlannerCase("kimi-k2-hosts", "kimi-k2", "megatron:tp1,pp16,dp128,ep64", "vllm:dp128,ep128,replicas8", "host"),
    PlannerCase(
        "kimi-k2-chain", "kimi-k2", "megatron:tp1,pp16,dp128,ep64", "vllm:dp128,ep128,replicas8", "host", "always"
    ),
)


class Described(msgspec.Struct):
    """Members of both sides, and where the records of their layouts are."""

    sources: list[Member]
    targets: list[Member]
    files: dict[str, str]


def run_planner_case(case: PlannerCase, config: Mapping[str, Any], save: Path | None, seconds: float) -> PlannerRow:
    """Measure one case. `save` is a folder for the plan's file. Raises what planning raises, `DeadlineError`."""
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        described = describe_apart(case, config, folder, seconds)
        argument = msgspec.msgpack.encode((case, described, str(save / f"{case.name}.plan") if save else ""))
        return msgspec.msgpack.decode(in_own_process(_measure, argument, seconds), type=PlannerRow)


def describe_apart(case: PlannerCase, config: Mapping[str, Any], folder: str, seconds: float) -> Described:
    """Write the records of all layouts of a case into `folder`, in a process of its own."""
    argument = msgspec.msgpack.encode((case, config, folder))
    return msgspec.msgpack.decode(in_own_process(_describe, argument, seconds), type=Described)


def read_sides(described: Described) -> tuple[float, Sides]:
    """Load the records: (seconds that decoding took, both sides)."""
    seconds, layouts = 0.0, {}
    for address, file in described.files.items():
        taken, layouts[address] = timed(partial(Layout.decode, Path(file).read_bytes()))
        seconds += taken
    return seconds, Sides(described.sources, described.targets, layouts)


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """(Seconds it took, what it returned)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _describe(argument: bytes) -> bytes:
    case, config, folder = msgspec.msgpack.decode(argument, type=tuple[PlannerCase, dict[str, Any], str])
    source, target = parse_side(case.source), parse_side(case.target)
    sides = members_of(config, source, target, (_DTYPE, _DTYPE), _RANKS_PER_HOST, lambda what: None)
    files = {}
    for address, layout in sides.layouts.items():
        file = Path(folder, address)
        file.write_bytes(layout.encoded)
        files[address] = str(file)
    return msgspec.msgpack.encode(Described(sides.sources, sides.targets, files))


def _measure(argument: bytes) -> bytes:
    case, described, save = msgspec.msgpack.decode(argument, type=tuple[PlannerCase, Described, str])
    decode_seconds, sides = read_sides(described)
    before, _ = rss_bytes()
    plan_seconds, made = timed(partial(_plan_with_statistics, sides, case))
    _, peak = rss_bytes()
    statistics = made.statistics
    if save:
        save_plan(made, Path(save))
    slices_seconds, slices = timed(partial(_slices, made))
    longest = sorted(slices, key=lambda name: -len(slices[name]))
    numbers = np.random.default_rng(0).integers(0, 1 << 62, 1 << 22)
    row = PlannerRow(
        case=case.name,
        source=case.source,
        target=case.target,
        source_ranks=len(sides.sources),
        target_ranks=len(sides.targets),
        logical_tensors=statistics.tensors,
        copies=statistics.copies,
        segments=statistics.segments,
        bytes=statistics.bytes,
        cross_host_bytes=statistics.cross_host_bytes,
        once_per_host_bytes=statistics.once_per_host_bytes,
        between_replicas_bytes=statistics.between_replicas_bytes,
        busiest_source_bytes=max(statistics.egress_bytes.values()),
        busiest_relay_bytes=max(statistics.relayed_bytes.values(), default=0),
        busiest_target_bytes=max(statistics.ingress_bytes.values()),
        distinct_layouts=len(sides.layouts),
        decode_seconds=decode_seconds,
        plan_seconds=plan_seconds,
        slices_seconds=slices_seconds,
        rank_plan_seconds=max(_proven(made, sides, name, slices[name]) for name in longest[:_PROVEN]),
        calibration_sort_seconds=min(timed(partial(np.sort, numbers))[0] for _ in range(3)),
        rss_before_bytes=before,
        peak_rss_bytes=peak,
        egress_max_over_mean=statistics.egress_max_over_mean,
        egress_over_bound=statistics.egress_over_bound,
        ingress_over_bound=statistics.ingress_over_bound,
        peers_per_rank_max=max(statistics.peers.values()),
        bytes_per_member_read=len(slices[longest[0]]),
        bytes_planner_read=sum(len(layout.encoded) for layout in sides.layouts.values()),
        bytes_planner_published=sum(map(len, slices.values())),
    )
    return msgspec.msgpack.encode(row)


def _plan_with_statistics(sides: Sides, case: PlannerCase) -> Plan:
    made = make_plan(sides, Policy(relay=case.relay, chain=case.chain))
    assert made.statistics.bytes
    return made


def _slices(made: Plan) -> dict[str, bytes]:
    """The record of every member's slice."""
    return {member.name: slice_of(made, member.name).encoded for member in made.members}


def _proven(made: Plan, sides: Sides, name: str, record: bytes) -> float:
    """Seconds that a member takes to read and prove its slice."""
    member = made.members[made.index(name)]
    own = [sides.layouts[address] if address else None for address in (member.source_layout, member.target_layout)]
    return timed(lambda: prove(Slice.decode(record), *own))[0]
