"""Gives every decoder of core and of the transports damaged input: nothing but weft's own errors may come out.

python tools/fuzz.py [--inputs 1000000] [--seed 0] [--only WORD]

Each input must be decoded, or refused, within `LONGEST_SECONDS`, and memory may not grow. `decoders.py` has the
decoders, `mutations.py` makes the inputs.
"""

from __future__ import annotations

import argparse
import math
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from decoders import readers
from mutations import Reader, inputs
from weft.errors import WeftError

LONGEST_SECONDS = 5.0
MOST_BYTES = 8 << 30
MOST_GROWTH_BYTES = 64 << 20


@dataclass(slots=True)
class Outcome:
    """Of one reader."""

    name: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    longest_seconds: float = 0.0
    grown_bytes: int = 0
    faults: tuple[str, ...] = ()


def fuzz(reader: Reader, count: int, seed: int) -> Outcome:
    """Give a reader so many inputs."""
    assert reader.samples, f"{reader.name}: there is no valid example"
    for sample in reader.samples:
        reader.read(reader.wrap(sample))  # what is damaged must have been good
    outcome, faults, begin = Outcome(reader.name), [], time.monotonic()
    before = 0
    for number, data in enumerate(inputs(reader, count, seed)):
        if number == count // 5:  # what is made once is there by now
            before = resident_bytes()
        started = time.perf_counter()
        try:
            with bounded(LONGEST_SECONDS):
                reader.read(data)
        except WeftError:
            outcome.refused += 1
        except Exception as error:  # noqa: BLE001  # this is what is looked for
            faults.append(f"{type(error).__name__}: {str(error)[:200]}; seed {seed}, input {number}: {data[:400]!r}")
        outcome.longest_seconds = max(outcome.longest_seconds, time.perf_counter() - started)
        outcome.inputs += 1
    outcome.grown_bytes = max(0, resident_bytes() - before)
    if outcome.grown_bytes > MOST_GROWTH_BYTES:
        faults.append(f"memory grew by {outcome.grown_bytes} bytes")
    outcome.seconds, outcome.faults = time.monotonic() - begin, tuple(faults)
    return outcome


class bounded:
    """A block that ends in `TimeoutError` after some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._late)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _late(self, number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not decoded within {self._seconds} s")


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(arguments: Sequence[str]) -> int:
    """Fuzz all readers, or some, with equal shares of the inputs; how many have failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose names contain this")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for files that are fuzzed")
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))  # what asks for more gets a `MemoryError`
    chosen = [reader for reader in readers(options.folder) if options.only in reader.name]
    outcomes, shares = [], sum(reader.share for reader in chosen)
    for reader in chosen:
        each = fuzz(reader, math.ceil(options.inputs * reader.share / shares), options.seed)
        outcomes.append(each)
        print(
            f"{each.name:60} {each.inputs:8} inputs, {each.refused:8} refused, {each.seconds:6.1f} s, longest "
            f"{each.longest_seconds * 1e3:7.1f} ms, grown {each.grown_bytes >> 10} KiB, {len(each.faults)} faults",
            flush=True,
        )
        for fault in each.faults[:5]:
            print(f"    {fault}")
    total = sum(each.inputs for each in outcomes)
    print(f"{total} inputs, {sum(each.seconds for each in outcomes):.0f} s")
    return sum(bool(each.faults) for each in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
