"""Compiles `pool.c` to `libpool.so` beside it. Run by `build_hook.py`, and by hand where nothing is installed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "src" / "weft_cudamalloc" / "pool.c"
# No library, so that the object runs with every libc and every CUDA; no stack protector, which would need one.
FLAGS = (
    "-O2",
    "-fPIC",
    "-shared",
    "-nostdlib",
    "-ffreestanding",
    "-fno-stack-protector",
    "-Wall",
    "-Wextra",
    "-Werror",
)


def main() -> int:
    made = SOURCE.with_name("libpool.so")
    partial = made.with_suffix(f".{os.getpid()}")  # renamed into place: several environments may build at once
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, "-o", str(partial), str(SOURCE)]
    try:
        code = subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        code = 127
    if code:
        print(
            f"weft-cudamalloc: {shlex.join(command)} failed ({code}); a C compiler is needed to build it from source: "
            "install gcc or clang, or name one in CC",
            file=sys.stderr,
        )
        return 1
    partial.rename(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
