"""The commands under `weft bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.errors import ConfigError
from weft.policy import Policy
from weft_cli.bench import command, packing_command, planner_command, transport_command
from weft_cli.bench.cases import NAMED, case_of, named_case
from weft_cli.models import load_config

bench_commands = typer.Typer(no_args_is_help=True, help="Measure what refits and plans cost on this machine.")
_MEASURED = ("nixl", "gloo")
_TRANSPORTS = typer.Option("--transport", help="May be given several times; nixl and gloo if not given.")
_JSON = typer.Option("--json", help="Print a JSON list instead of a table.")


@bench_commands.command("refit")
def bench_refit(
    named: Annotated[
        list[str] | None,
        typer.Option("--case", help=f"{', '.join(NAMED)}. Several times; instead of model, sides and transport."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="As for `weft plan`; qwen3-0.6b if not given.")] = None,
    source: Annotated[
        str | None, typer.Option(help="The trainer, as for `weft plan`; megatron:tp2 if not given.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The engines, as for `weft plan`; vllm:tp2 if not given.")] = None,
    transports: Annotated[
        list[str] | None, typer.Option("--transport", help="May be given several times; nixl if not given.")
    ] = None,
    staging_bytes: Annotated[
        int | None, typer.Option(help="Most staging memory of a member per direction; the policy's if not given.")
    ] = None,
    digests: Annotated[
        bool | None, typer.Option(help="Only with, or only without, digests; both if not given.")
    ] = None,
    cycles: Annotated[int, typer.Option(min=2, help="Refits per case; the first is cold.")] = 6,
    reuse: Annotated[bool, typer.Option(help="Join once; otherwise anew for every version, for comparison.")] = True,
    figure: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the first cycles by phase: .html needs plotly, .png kaleido too."),
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Time whole refits between processes on this machine, in turn with bare transfers of as many bytes.

    One process per rank holds plain memory in the layout that the framework would have; memory is poisoned before every
    refit, and every byte of every target is checked after the clock has stopped. `ratio` is the refit's rate over the
    best rate (of four chunk sizes) of NIXL, gloo or (for mapped) process_vm_writev alone between the same processes; a
    rate above that is an error. Wrong bytes end in exit code 1.

    Needs Linux.

    **Examples**

        weft bench refit

        weft bench refit --case nixl-dense --case nixl-moe --no-digests --json

        weft bench refit --transport gloo --no-reuse --plot cycles.html
    """
    chosen = [digests] if digests is not None else [False, True]
    if named and (model or source or target or transports or staging_bytes):
        raise ConfigError("--case goes without --model, --source, --target, --transport and --staging-bytes")
    if named:
        cases = [named_case(name, digest, cycles, reuse=reuse) for name in named for digest in chosen]
    else:
        config = load_config(model or "qwen3-0.6b")
        sides = source or "megatron:tp2", target or "vllm:tp2"
        most = Policy().staging_bytes if staging_bytes is None else staging_bytes
        policies = [Policy(digests=digest, staging_bytes=most) for digest in chosen]
        cases = [
            case_of(model or "qwen3-0.6b", config, *sides, name, policy, cycles, reuse=reuse)
            for name in transports or ["nixl"]
            for policy in policies
        ]
    command.refit(cases, as_json=as_json, figure=figure)


@bench_commands.command("transport")
def bench_transport(
    transports: Annotated[list[str] | None, _TRANSPORTS] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Time a transport alone between two processes, in turn with bare transfers of as many bytes.

    One segment of 4 KiB to 64 MiB, 10,000 of 100 KiB and 100,000 of 1 KiB, in buckets as refits have them. Seconds run
    from the first post until the sender knows that everything has arrived. A rate above the best (of four chunk sizes)
    of NIXL, gloo or (for mapped) process_vm_writev alone is an error; every byte is checked once. Wrong bytes end in
    exit code 1.

    **Example**

        weft bench transport --transport nixl --json
    """
    transport_command.transport(transports or _MEASURED, as_json=as_json)


@bench_commands.command("registration")
def bench_registration(
    transports: Annotated[list[str] | None, _TRANSPORTS] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Time registering 1 GiB at once and 10,000 tensors one by one, and preparing up to 100,000 segments.

    What a refit that keeps its registrations does not pay again.

    **Example**

        weft bench registration --transport nixl
    """
    transport_command.registration(transports or _MEASURED, as_json=as_json)


@bench_commands.command("packing")
def bench_packing(
    transports: Annotated[list[str] | None, _TRANSPORTS] = None,
    sources: Annotated[
        int | None,
        typer.Option(min=2, max=64, help="Instead: so many sources of one target, each by itself and gathered first."),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--plot", help="Draw rates by length: .html needs plotly, .png kaleido too.")
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Find the length from which on runs had best move straight instead of packed: `Policy.direct_run_bytes`.

    Whole refits between two processes, of runs of 256 B to 4 MiB that lie apart at both ends, 64 MiB or 32,768 runs of
    them: straight, and through staging (gathered, sent as one, scattered), in turn. The best length is the one with
    which all of these together lose least against the faster way of each. Every byte is checked after the last refit.

    With `--sources` 4 KiB to 4 MiB, packed already, move from so many processes to one: each sends its share, or the
    first gathers all shares and sends once. Wrong bytes end in exit code 1. Needs Linux; takes minutes.

    **Examples**

        weft bench packing

        weft bench packing --transport nixl --plot packing.html

        weft bench packing --sources 4 --json
    """
    if sources and figure:
        raise ConfigError("--plot goes without --sources, whose figures are a table")
    if sources:
        packing_command.gathering(transports or _MEASURED, sources, as_json=as_json)
    else:
        packing_command.packing(transports or _MEASURED, as_json=as_json, figure=figure)


@bench_commands.command("planner")
def bench_planner(
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            help="qwen3-30b-a3b, kimi-k2-tp1, kimi-k2-tp2, kimi-k2-hosts (relays within hosts) or kimi-k2-chain (from "
            "replica to replica, too); all if not given. Several times.",
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the plans in this folder.", file_okay=False)] = None,
    beside_megatron: Annotated[
        bool, typer.Option("--beside-megatron", help="Run Megatron-Core's own planner beside weft's instead.")
    ] = False,
    ranks: Annotated[
        list[int] | None,
        typer.Option(help="With --beside-megatron: source ranks, 64 times a number; 64, 128, 256 if not given."),
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Time global plans of real sizes, and say how good they are.

    One process describes the layouts, another reads their records and plans, so seconds and memory are the planner's.
    A fixed sort in the same process says how fast the machine is. `egress_over_bound` and `ingress_over_bound` compare
    the busiest member with what geometry and nearness allow at best.

    With `--beside-megatron` Qwen3-30B-A3B moves from tp2,pp4,ep16 to half as many ranks of tp4,etp4. Megatron's
    functions run unchanged on synthetic metadata, without reading modules and without communication. Needs `pip install
    weft-megatron megatron-core==0.16.1`; 256 ranks take two minutes and 3 GB.

    Needs Linux.

    **Examples**

        weft bench planner

        weft bench planner --case kimi-k2-tp1 --save plans --json

        weft bench planner --beside-megatron --ranks 64 --ranks 128
    """
    if beside_megatron and (cases or save):
        raise ConfigError("--case and --save go without --beside-megatron, which has one case and keeps no plans")
    if ranks and not beside_megatron:
        raise ConfigError("--ranks goes with --beside-megatron")
    if beside_megatron:
        planner_command.beside_megatron(ranks or [64, 128, 256], as_json=as_json)
    else:
        planner_command.planner(cases or [], save, as_json=as_json)
