"""From two sides and a model to a plan. No output here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from weft.contracts import Adapter
from weft.errors import ConfigError
from weft.layout import Layout
from weft.member import Member
from weft.plan import Plan, plan
from weft.planfile import load_plan, save_plan
from weft.plugins import load
from weft.policy import Policy
from weft_cli.sides import Side, check_axes

Report = Callable[[str], None]


class Sides(msgspec.Struct, frozen=True):
    """All members of both sides, and every layout by its address."""

    sources: list[Member]
    targets: list[Member]
    layouts: dict[str, Layout]


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


def read_plan(path: Path) -> Plan:
    """`weft.planfile.load_plan`. Raises `ConfigError` for a file that cannot be read, and what it raises itself."""
    try:
        return load_plan(path)
    except OSError as error:
        raise ConfigError(f"plan {path} cannot be read: {error.strerror}") from error


def write_plan(made: Plan, path: Path) -> None:
    """`weft.planfile.save_plan`. Raises `ConfigError` for a file that cannot be written."""
    try:
        save_plan(made, path)
    except OSError as error:
        raise ConfigError(f"plan {path} cannot be written: {error.strerror}") from error
