"""Runs the demo for the command line: temporary directory, signals, exit code."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import msgspec
from rich.console import Console

from weft_cli.demo.loop import cores, run
from weft_cli.demo.processes import ChildError
from weft_cli.demo.report import Progress
from weft_cli.demo.settings import Settings

INTERRUPTED = 130
"""What shells call an end by Ctrl-C: 128 + SIGINT."""


def demo(model: str, transport: str, steps: int, seed: int, json_file: Path | None, *, flip_byte: bool) -> int:
    """Run it; returns the exit code: 0 all checks passed, 1 one failed or a child died, 130 interrupted."""
    began = time.perf_counter()
    available = cores()
    ranks = 2 if len(available) >= 2 else 1
    progress = Progress(Console(stderr=json_file == Path("-")))
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="weft-demo-") as directory:
            settings = Settings(
                directory,
                model_name=model,
                transport=transport,
                steps=steps,
                seed=seed,
                engine_ranks=ranks,
                engine_cores=tuple(available[:ranks]),
            )
            result = run(settings, progress, flip_byte=flip_byte)
        result = msgspec.structs.replace(result, seconds=time.perf_counter() - began)
        progress.result(result)
        if json_file is not None:
            _write(msgspec.json.format(msgspec.json.encode(result), indent=2), json_file)
        return 1 if result.failures else 0
    except ChildError as error:
        print(f"weft demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("weft demo: interrupted; every process it started has been ended", file=sys.stderr)
        return INTERRUPTED
    finally:
        progress.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End like Ctrl-C, so that children are ended too."""
    raise KeyboardInterrupt


def _write(data: bytes, json_file: Path) -> None:
    if json_file == Path("-"):
        sys.stdout.write(data.decode() + "\n")
    else:
        json_file.write_bytes(data + b"\n")
