"""Runs a verification in a process of its own, and says what came of it."""

from __future__ import annotations

import json
import select
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console

from weft.deadline import Deadline
from weft.errors import ConfigError, WeftError
from weft.layout import ITEM_BYTES
from weft.verification import Request, Verification
from weft_cli.demo.channel import Reply
from weft_cli.demo.processes import Child, ChildError, Family
from weft_cli.sides import Side, parse_side
from weft_cli.verify.show import print_verification

_ADAPTERS = {"module": "dtensor"}
"""What people call it, where the adapter's name says something else."""

_GLANCE_SECONDS = 0.5


def make_request(
    model: str, checkpoint: str | None, side: Side, dtype: str | None, casts: Sequence[str], ignore: Sequence[str],
    options: str,
) -> Request:  # fmt: skip
    """From the command line. Raises `ConfigError` with everything that is wrong with it."""
    faults: list[str] = []
    pairs = []
    for cast in casts:
        source, _, target = cast.partition(":")
        if source not in ITEM_BYTES or target not in ITEM_BYTES:
            faults.append(f"--cast {cast!r}: expected FROM:TO, such as float32:bfloat16")
        pairs.append((source, target))
    try:
        further = json.loads(options)
    except json.JSONDecodeError as error:
        faults.append(f"--options is not JSON ({error})")
    else:
        if not isinstance(further, dict):
            faults.append(f"--options should be a JSON object, found {type(further).__name__}")
    if not Path(model).is_dir():
        faults.append(f"--model {model}: no such directory")
    if faults:
        raise ConfigError("; ".join(faults))
    return Request(
        model=model, checkpoint=checkpoint or model, parallel=dict(side.parallel), dtype=dtype or "",
        casts=tuple(pairs), ignore=tuple(ignore), options=further,
    )  # fmt: skip


def verify(what: str, request: Request, seconds: float) -> Verification:
    """Start, compare and end. Raises `ConfigError` and `WeftError` with what the adapter says, and `ChildError` when
    its process dies or takes longer than `seconds`.
    """
    framework = parse_side(what).framework
    adapter = _ADAPTERS.get(framework, framework)
    with tempfile.TemporaryDirectory(prefix="weft-verify-") as logs, Family(Path(logs)) as family:
        child = family.start("verify", "weft_cli.verify.child", {})
        child.send("verify", adapter=adapter, request=msgspec.to_builtins(request))
        answer = _answer(child, Deadline.after(seconds))
    if "error" in answer:
        raise (ConfigError if answer["usage"] else WeftError)(answer["error"])
    return msgspec.convert(answer["verification"], Verification, strict=False)


def _answer(child: Child, deadline: Deadline) -> Reply:
    while not deadline.expired():
        ready, _, _ = select.select([child], [], [], min(_GLANCE_SECONDS, deadline.remaining()))
        answer = child.take() if ready else None
        if answer is not None:
            return answer
        child.note_shared_memory()  # what engines share can be asked for only while they run
    raise child.failure(f"is not done after {deadline.seconds:.0f} s")


def show(what: str, request: Request, seconds: float, *, partial: bool, every: bool, as_json: bool) -> bool:
    """Verify and print; returns whether nothing is wrong."""
    try:
        with Console(stderr=True).status(f"loading {what} from {request.model} and comparing"):
            found = verify(what, request, seconds)
    except ChildError as error:
        raise WeftError(str(error)) from error
    failures = found.failures(partial=partial)
    if as_json:
        result: dict[str, Any] = {**msgspec.to_builtins(found), "failures": failures}
        typer.echo(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
    else:
        print_verification(Console(), found, failures, every=every)
    return not failures
