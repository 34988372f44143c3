"""`weft keep`: a process without a model that keeps published versions for others."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from weft import Config, Keeper, load_config
from weft.deadline import Deadline
from weft.errors import ConfigError, StoreError, WeftError

_GLANCE_SECONDS = 60.0
"""A wait for the next version is begun anew so often."""


def keep(
    name: Annotated[str, typer.Option(help="By which others know this holder, unique in the job.")] = "keeper",
    retain: Annotated[int, typer.Option(min=1, help="Versions that are kept, the newest ones.")] = 1,
    file: Annotated[
        Path | None, typer.Option(help="TOML file; WEFT_CONFIG names one if not given.", dir_okay=False)
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the first version.")] = 600.0,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long to keep versions; 0 for as long as the process runs.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per line.")] = False,
) -> None:
    """Keep the versions that a job publishes, without a model, for replicas that join or go back.

    Reads each version that a `weft.Publisher` or a relay holds, whatever its sharding, and serves the newest ones to
    every `weft.Subscriber` of the job, as any relay does, while trainers and engines come and go. It needs no
    accelerator, and `retain` + 2 times the model's bytes of host memory, which are checked first. Transport, store,
    job, policy and secret are those of the job's members, read as `weft config` shows them.

    Ends with 0 when it is interrupted or terminated, or after `--seconds`; with 1 when nobody holds any version within
    `--timeout`, or the store is lost. Why there is none newer, or why one could not be read, is told on standard error
    every minute, and the next one is waited for.

    **Examples**

        WEFT_STORE=tcp://10.0.0.1:29511 WEFT_JOB=grpo-7 WEFT_TRANSPORT=nixl weft keep --retain 3

        weft keep --file weft.toml --json | jq .version
    """
    say = partial(_say, sys.stdout, as_json)
    with redirect_stdout(sys.stderr):  # transports print to what is standard output when they are loaded
        _keep(name, retain, load_config({"deadlines": {"offer": timeout}}, file=file), seconds, say)


def _keep(name: str, retain: int, config: Config, seconds: float, say: Callable[..., None]) -> None:
    settings = config.settings
    needed = {"transport": settings.transport, "store": settings.store, "job": settings.job}
    if missing := [name for name, value in needed.items() if value is None]:
        raise ConfigError(f"weft keep needs {', '.join(missing)}: see `weft config --explain`")
    keeper = Keeper(
        name=name, retain=retain, store=str(settings.store), job=str(settings.job), transport=str(settings.transport),
        transport_options=config.transport_options, deadlines=config.deadlines, policy=config.policy,
        host=settings.host, domain=settings.domain, secret=settings.secret,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), keeper:
        say("keeps {retain} versions in {host_bytes} bytes", retain=retain, host_bytes=keeper.host_bytes)
        limit = Deadline.after(seconds or math.inf)
        while not limit.expired():
            _next(keeper, limit.earlier(_GLANCE_SECONDS), say)


def _next(keeper: Keeper, limit: Deadline, say: Callable[..., None]) -> None:
    """Keep the next version, or say why there is none. Raises `StoreError`."""
    try:
        report = keeper.keep(limit)
    except StoreError:
        raise
    except WeftError as error:
        typer.echo(f"weft: {error}", err=True)
        return
    say(
        "version {version} from {holder}: {bytes} bytes in {seconds:.1f} s, digest {digest}",
        version=report.version, holder=keeper.holder, bytes=report.bytes, seconds=report.seconds["total"],
        digest=report.digest,
    )  # fmt: skip


def _say(out: TextIO, as_json: bool, words: str, **facts: Any) -> None:
    typer.echo(json.dumps(facts) if as_json else words.format(**facts), file=out)
