"""`weft plan`: what a refit would move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from weft.plugins import load
from weft.policy import Policy
from weft_cli.figures import Figures, figures
from weft_cli.models import load_config
from weft_cli.planning import Report, Sides, make_plan, members_of, write_plan
from weft_cli.sides import parse_side

_MOST_ROWS = 8
"""Members listed of each side; `--json` has them all."""


@dataclass(frozen=True, slots=True)
class Request:
    """A model and two sides, as given on the command line."""

    model: str
    source: str
    target: str
    dtypes: tuple[str, str]
    """The source's and the target's."""
    ranks_per_host: int
    casts: Sequence[str] = ()
    """FROM:TO, beside the one that two dtypes declare."""
    only: Sequence[str] = ()
    ignore: Sequence[str] = ()
    relay: str = "never"
    chain: str = "never"

    @property
    def policy(self) -> Policy:
        """What was asked, in the planner's terms; planning checks it."""
        declared = [":".join(self.dtypes)] if self.dtypes[0] != self.dtypes[1] else []
        pairs = [cast.partition(":") for cast in (*declared, *self.casts)]
        casts = tuple((source, target) for source, _, target in pairs)
        only, ignore = tuple(self.only), tuple(self.ignore)
        return Policy(casts=casts, only=only, ignore=ignore, relay=self.relay, chain=self.chain)


def describe(request: Request, report: Report) -> Sides:
    """Members and layouts of both sides. Raises `ConfigError`, `NotSupportedError` and `PluginError` as they come."""
    source, target = parse_side(request.source), parse_side(request.target)
    return members_of(load_config(request.model), source, target, request.dtypes, request.ranks_per_host, report)


def show(request: Request, transport: str | None, save: Path | None, *, as_json: bool) -> None:
    """Plan and print. Raises `PlanError` with every fault, and what `describe` raises."""
    policy = request.policy
    if transport is not None:
        able = load("weft.transports", transport)({}).capabilities
        segments = min(policy.max_segments, able.max_segments)
        policy = msgspec.structs.replace(policy, direct_run_bytes=able.direct_run_bytes, max_segments=segments)
    with progress() as report:
        sides = describe(request, report)
        report(f"planning {len(sides.sources)} sources and {len(sides.targets)} targets")
        plan = make_plan(sides, policy)
        found = figures(plan, sides)
        if save is not None:
            report(f"saving {save}")
            write_plan(plan, save)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    output = console()
    output.print(_summary(request, found))
    output.print(_members(found))


@contextmanager
def progress() -> Iterator[Report]:
    """Say what is going on, on a terminal only, and on standard error, so that standard output stays clean."""
    with Console(stderr=True).status("reading") as status:
        yield lambda what: status.update(what)


def console() -> Console:
    """Standard output; into a file or a pipe nothing is cut off."""
    output = Console()
    return output if output.is_terminal else Console(width=320)


def _summary(request: Request, found: Figures) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    memory = max(found.memory, key=lambda name: found.memory[name].total)
    most = found.memory[memory]
    rows = [
        ("plan", f"{request.model}: {request.source} -> {request.target}"),
        ("fingerprint", found.fingerprint[:16]),
        ("members", f"{_count(found.sources, 'source')}, {_count(found.targets, 'target')} in "
         f"{_count(found.replicas, 'replica')}"),
        ("bytes", f"{found.bytes:,} written per refit, {found.local_bytes:,} of them within a member"),
        ("hosts", f"{found.cross_host_bytes:,} bytes between hosts; {found.once_per_host_bytes:,} if every box came "
         "once to each host that wants it"),
        ("copies", f"{found.copies:,} of {found.tensors:,} tensors"),
        ("segments", f"{found.segments:,}, {found.bytes // max(1, found.segments):,} bytes each on average"),
        ("balance", f"busiest sender {found.busiest_over_mean:.2f} x the mean, {found.egress_over_bound:.2f} x the "
         f"least possible; busiest receiver {found.ingress_over_bound:.2f} x the least possible"),
        ("peers", f"at most {found.most_peers}"),
        *_relays(found),
        *(("packed", f"{each.copies:,} copies of {each.bytes:,} bytes: {each.reason}") for each in found.packed),
        ("memory", f"at most {most.total:,} bytes, on {memory}: {most.scratch:,} of scratch, {most.staging_in:,} and "
         f"{most.staging_out:,} of staging in and out"),
    ]  # fmt: skip
    if not found.packed:
        rows.insert(-1, ("packed", "nothing: no cast, and no run is too short"))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _relays(found: Figures) -> list[tuple[str, str]]:
    if not found.relayed_bytes:
        return []
    passed_on, abroad = sum(found.relayed_bytes.values()), found.between_replicas_bytes
    who = _count(len(found.relayed_bytes), "target")
    return [("relays", f"{who} pass on {passed_on:,} bytes, {abroad:,} of them to other replicas")]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _members(found: Figures) -> Table:
    """The busiest of each side, by what they send or receive; not those that do nothing."""
    sends = {**found.egress_bytes, **found.relayed_bytes}
    table = Table("busiest", "sends", "receives", "peers", "memory", box=None, pad_edge=False)
    for side in (found.egress_bytes, found.ingress_bytes):
        busy = sorted((name for name in side if side[name]), key=lambda name: -side[name])
        for name in busy[:_MOST_ROWS]:
            table.add_row(
                name, f"{sends.get(name, 0):,}", f"{found.ingress_bytes.get(name, 0):,}",
                str(found.peers[name]), f"{found.memory[name].total:,}",
            )  # fmt: skip
        if len(busy) > _MOST_ROWS:
            table.add_row(f"and {len(busy) - _MOST_ROWS} more", "", "", "", "")
        if len(side) > len(busy):
            table.add_row(f"and {len(side) - len(busy)} that move nothing", "", "", "", "")
    return table
