"""Running a case: a store, one process per member, and their results."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import msgspec

from weft.plugins import load
from weft.store_server import serve_store
from weft_cli.bench.megatron_planner import megatron_version
from weft_cli.bench.members import run_member
from weft_cli.bench.processes import run_processes
from weft_cli.bench.rows import row
from weft_cli.bench.settings import Case, MemberResult, Seat


def run_case(case: Case) -> Mapping[str, Any]:
    """The figures of one case (see `rows.row`).

    Raises `WeftError` when a member fails or `case.seconds` pass, `ConfigError` without Megatron-Core where the case
    runs beside it.
    """
    if case.beside_megatron:
        megatron_version()
    taken = {seat.name: msgspec.msgpack.encode(seat) for seat in seats(case)}
    with serve_store() as server:
        answers = run_processes(run_member, server.url, taken, msgspec.msgpack.encode(case), case.seconds)
    return row(case, [msgspec.msgpack.decode(answers[name], type=MemberResult) for name in sorted(answers)])


def seats(case: Case) -> list[Seat]:
    """The processes of a case."""
    sources, targets = (
        range(load("weft.adapters", name).world_size(sizes)) for name, sizes in (case.source, case.target)
    )
    if case.collocated:
        return [Seat(name=f"rank/{max(s or 0, t or 0)}", source=s, target=t) for s, t in zip_longest(sources, targets)]
    return [
        *(Seat(name=f"source/{rank}", source=rank, target=None) for rank in sources),
        *(Seat(name=f"target/{rank}", source=None, target=rank) for rank in targets),
    ]
