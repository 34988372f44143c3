"""The commands under `weft bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.errors import ConfigError
from weft_cli.bench import command, planner_command

bench_commands = typer.Typer(no_args_is_help=True, help="Measure what refits and plans cost on this machine.")
_JSON = typer.Option("--json", help="Print a JSON list instead of a table.")


@bench_commands.command("refit")
def bench_refit(
    model: Annotated[str, typer.Option(help="As for `weft plan`.")] = "qwen3-0.6b",
    source: Annotated[str, typer.Option(help="The trainer, as for `weft plan`.")] = "megatron:tp2",
    target: Annotated[str, typer.Option(help="The engines, as for `weft plan`.")] = "vllm:tp2",
    transports: Annotated[list[str] | None, typer.Option("--transport", help="May be given several times.")] = None,
    digests: Annotated[
        bool | None, typer.Option(help="Only with, or only without, digests; both if not given.")
    ] = None,
    cycles: Annotated[int, typer.Option(min=2, help="Refits per case; the first is cold.")] = 6,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Time whole refits between processes on this machine, and bare NIXL writes of as many bytes beside them.

    One process per rank holds plain memory in the layout that the framework would have; every byte of every target is
    checked after the clock has stopped. `ratio` is the refit's rate over the best rate of bare writes (of four chunk
    sizes) between the same processes. Wrong bytes end in exit code 1.

    **Examples**

        weft bench refit

        weft bench refit --transport nixl --transport gloo --no-digests --json
    """
    chosen = [digests] if digests is not None else [False, True]
    command.refit(model, source, target, transports or ["nixl"], chosen, cycles, as_json=as_json)


@bench_commands.command("planner")
def bench_planner(
    cases: Annotated[
        list[str] | None,
        typer.Option("--case", help="qwen3-30b-a3b, kimi-k2-tp1 or kimi-k2-tp2; all if not given. Several times."),
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
