"""A soak of a real engine: `vllm_engine/soak_case.py` in one drive after the other.

`python -m support.vllm_soak --out FILE` is the long form: so many refits in every pause mode of every drive.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support.vllm_case import run_case

MODES = ("abort", "wait", "keep")
RSS_BYTES, DESCRIPTORS = 48 * 2**20, 8
"""Most that any process of the engine may hold more at the end than after a quarter of the refits."""


def growth(held: list[dict[str, int]]) -> dict[str, int]:
    """What each figure is more at the end than after a quarter of the refits."""
    first = next(each for each in held if each["refits"] >= held[-1]["refits"] / 4)
    return {name: held[-1][name] - first[name] for name in first if name != "refits"}


def not_flat(held: list[dict[str, int]]) -> list[str]:
    """Which figures have grown too much, in words."""
    bounds = {name: RSS_BYTES if name.endswith("bytes") else DESCRIPTORS for name in held[0]}
    return [f"{name}: {more} more" for name, more in growth(held).items() if more > bounds[name]]


def main(arguments: list[str]) -> None:
    """Run what is asked for, and write one JSON list of figures."""
    parser = argparse.ArgumentParser(prog="python -m support.vllm_soak")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--refits", type=int, default=40, help="of each mode")
    parser.add_argument("--between", type=float, default=1.0, help="mean seconds between two faults")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--case", nargs="+", default=["published:gloo", "lock_step:nixl"], metavar="DRIVE:TRANSPORT")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    figures: list[dict[str, Any]] = []
    for named in options.case:
        drive, transport = named.split(":")
        case = {
            "seed": options.seed, "drive": drive, "transport": transport, "refits": options.refits,
            "between": options.between, "modes": options.mode, "tp": 1,
        }  # fmt: skip
        print(case, flush=True)
        with TemporaryDirectory() as folder:
            figures.append(run_case("soak_case.py", case, Path(folder), seconds=7200))
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
        faults = not_flat(figures[-1]["held"])
        print(f"{named}: {figures[-1]['modes']}, growth {growth(figures[-1]['held'])}", flush=True)
        assert not faults, f"{case}: {faults}"


if __name__ == "__main__":
    main(sys.argv[1:])
