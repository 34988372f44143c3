"""The commands about plans: `weft plan`, `weft explain`, `weft diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.errors import ConfigError
from weft_cli import diff_command, explain_command, plan_command

_MODEL = typer.Option(
    help="A preset (see `weft plan --help`), a Hugging Face config.json, or a directory that holds one."
)
_SOURCE = typer.Option(help="The trainer: framework and parallel sizes, such as megatron:tp2,pp2.")
_TARGET = typer.Option(help="The engines: framework and parallel sizes, such as vllm:tp2,dp4.")
_DTYPE = typer.Option(help="Dtype of the engine's weights.")
_SOURCE_DTYPE = typer.Option(help="Dtype of the trainer's weights, if it differs: then a cast is declared.")
_CAST = typer.Option("--cast", help="FROM:TO: a further difference of dtype, to be rounded. Several times.")
_ONLY = typer.Option(help="Pattern (* matches anything) of the tensors that move; all if not given. Several times.")
_IGNORE = typer.Option(help="Pattern of tensors that the trainer holds and no engine wants. Several times.")
_RELAY = typer.Option(
    help="host or domain: engines' ranks on one pass on what several of them want; auto: host, where it saves a "
    "quarter of the bytes between hosts; or never."
)
_CHAIN = typer.Option(
    help="always: the trainer sends to one replica, and each passes on to the next; auto: where that saves a quarter "
    "of what the busiest member sends, or of the bytes between domains; or never."
)
_RANKS_PER_HOST = typer.Option(min=1, help="Ranks that share a host; sources and targets have hosts of their own.")
_JSON = typer.Option("--json", help="Print JSON instead of a table.")


def plan(
    model: Annotated[str, _MODEL],
    source: Annotated[str, _SOURCE],
    target: Annotated[str, _TARGET],
    dtype: Annotated[str, _DTYPE] = "bfloat16",
    source_dtype: Annotated[str | None, _SOURCE_DTYPE] = None,
    casts: Annotated[list[str] | None, _CAST] = None,
    only: Annotated[list[str] | None, _ONLY] = None,
    ignore: Annotated[list[str] | None, _IGNORE] = None,
    relay: Annotated[str, _RELAY] = "never",
    chain: Annotated[str, _CHAIN] = "never",
    ranks_per_host: Annotated[int, _RANKS_PER_HOST] = 8,
    transport: Annotated[
        str | None,
        typer.Option(help="Pack the runs that this transport does not move by themselves; none if not given."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this file.", dir_okay=False)] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Show what a refit would move, without trainer, engine or GPU.

    Each side is `framework:axisN,axisM`, with the framework's own flag names: `tp`, `pp`, `cp`, `dp`, `ep`, `etp` for
    Megatron. Its ranks are tp·pp·cp·dp; ep and etp divide the same ranks again, and vpp, first and last say which
    stage has which layers. Frameworks are the adapters in `weft plugins`.

    The plan is proven to write every element of every target once; a plan that cannot be is refused with every fault,
    and exit code 1. Beside traffic and balance the table shows the busiest members, what is packed and why, and the
    memory that weft would allocate: scratch arenas, and staging for what is packed.

    Presets: llama-3.1-8b, qwen2.5-7b, qwen3-0.6b, qwen3-4b, qwen3-30b-a3b, mixtral-8x7b, gpt-oss-120b, glm-4.5,
    glm-5, deepseek-v3, kimi-k2, and qwen3-moe-0.6b, made up for `weft bench`.

    **Examples**

        weft plan --model qwen3-0.6b --source megatron:tp2,pp2 --target vllm:tp2

        weft plan --model ./checkpoint --source megatron:tp8,dp4 --source-dtype float32 --target vllm:tp4 --json

        weft plan --model glm-4.5 --source megatron:pp4,ep8,dp8 --target vllm:tp8,ep8 --cast bfloat16:float32

        weft plan --model llama-3.1-8b --source megatron:tp4,pp4 --target vllm:tp8 --transport nixl --save llama.plan
    """
    dtypes = source_dtype or dtype, dtype
    request = plan_command.Request(
        model, source, target, dtypes, ranks_per_host, casts or (), only or (), ignore or (), relay, chain
    )
    plan_command.show(request, transport, save, as_json=as_json)


def explain(
    what: Annotated[
        list[str], typer.Argument(metavar="[PLAN] TENSOR", help="A file of `weft plan --save`, and a tensor's name.")
    ],
    rank: Annotated[
        str | None, typer.Option(help="Only this target: its name, or its number in the order of names, from 0.")
    ] = None,
    model: Annotated[str | None, _MODEL] = None,
    source: Annotated[str | None, _SOURCE] = None,
    target: Annotated[str | None, _TARGET] = None,
    dtype: Annotated[str, _DTYPE] = "bfloat16",
    source_dtype: Annotated[str | None, _SOURCE_DTYPE] = None,
    casts: Annotated[list[str] | None, _CAST] = None,
    only: Annotated[list[str] | None, _ONLY] = None,
    ignore: Annotated[list[str] | None, _IGNORE] = None,
    relay: Annotated[str, _RELAY] = "never",
    chain: Annotated[str, _CHAIN] = "never",
    ranks_per_host: Annotated[int, _RANKS_PER_HOST] = 8,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Say where each box of a tensor comes from, and why that member sends it.

    A plan file knows boxes, bytes, senders and how near they are. Names of buffers, how many members hold the same box,
    and the sender's share among the nearest of them follow from the layouts: give `--model`, `--source` and `--target`,
    with the file or instead of it. What stays unknown is said.

    **Examples**

        weft explain llama.plan model.layers.0.mlp.gate_proj.weight

        weft explain llama.plan model.norm.weight --rank rollout0/3 --json

        weft explain lm_head.weight --model llama-3.1-8b --source megatron:tp4,pp4 --target vllm:tp8
    """
    given = [side for side in (model, source, target) if side is not None]
    if given and len(given) < 3:
        raise ConfigError(f"--model, --source and --target come together; {len(given)} of the three are given")
    request = None
    if model is not None and source is not None and target is not None:
        dtypes = source_dtype or dtype, dtype
        request = plan_command.Request(
            model, source, target, dtypes, ranks_per_host, casts or (), only or (), ignore or (), relay, chain
        )
    explain_command.show(what, request, rank, as_json=as_json)


def diff(
    before: Annotated[Path, typer.Argument(metavar="PLAN", help="A file of `weft plan --save`.")],
    after: Annotated[Path, typer.Argument(metavar="PLAN", help="Another.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Say what tells two plans apart: members, tensors, policy, copies, and bytes of every pair of members.

    A copy is known by its sender, its receiver, its tensor and its box, wherever these lie in memory.

    Exit codes: 0 they are equal, 1 they differ (or a file was refused, with words on standard error), 2 used wrongly.

    **Examples**

        weft diff yesterday.plan today.plan

        weft diff yesterday.plan today.plan --json | jq .pairs
    """
    if not diff_command.show(before, after, as_json=as_json):
        raise typer.Exit(1)
