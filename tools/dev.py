#!/usr/bin/env python3
"""One entry for everything: sets up what is needed on a machine with Python 3.11+, git and pip, then runs it.

It makes its own tool environment (`.venv-tools`) with a pinned nox, installs the Debian packages that a session needs
(as root; else it says which are missing), and runs nox sessions: those of `test` two at a time (`side_by_side.py`), all
others one after the other. Standard library only.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import side_by_side

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".venv-tools"
PINS = ROOT / "constraints" / "tools.txt"
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # not on everybody's PATH

COMMANDS = {
    "demo": ("a Megatron-Core model learns while a vLLM engine serves each new version of its weights", ["demo"]),
    "test": (
        "everything that runs without a GPU: all of the below but demo, faults, soak and gpu, two sessions at a time",
        ["lint", "types", "tests", "integration", "wheels", "docs"],
    ),
    "lint": ("ruff, import contracts, lockstep versions, constraints up to date", ["lint"]),
    "types": ("mypy --strict, per package", ["types"]),
    "tests": ("unit tests, each package in an environment of its own; 'tests(core)' for one", ["tests"]),
    "integration": ("real Megatron-Core, vLLM and NIXL together", ["integration"]),
    "wheels": ("build wheels and sdists, install them without an index, discover the plug-ins", ["wheels"]),
    "docs": ("build the documentation", ["docs"]),
    "faults": ("every step, role and fault in fleets of real processes; writes docs/fault-matrix.json", ["faults"]),
    "soak": ("refits under random faults while replicas, or a vLLM engine, answer all the time; minutes", ["soak"]),
    "gpu": ("the GPU matrix; skips, with the reason, what this machine has no GPU for", ["gpu"]),
}


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


# Debian package -> (the sessions that need it, is it there?). libnuma1: vLLM's CPU kernels; iproute2: tests across
# two network namespaces; redis-server: the tests of weft-redis.
DEBIAN: dict[str, tuple[set[str], Callable[[], bool]]] = {
    "libnuma1": ({"tests", "integration", "demo", "wheels", "soak"}, lambda: has_library("libnuma.so.1")),
    "redis-server": ({"tests"}, lambda: shutil.which("redis-server") is not None),
    "iproute2": ({"integration"}, lambda: all(shutil.which(name, path=SBIN) for name in ("ip", "tc"))),
}


def fail(message: str) -> None:
    sys.exit(f"dev.py: {message}")


def run(*command: str | Path, quiet: bool = False, **environment: str) -> int:
    """Runs a command from the repository root; with `quiet` its output is shown only if it fails."""
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, check=False, cwd=ROOT, env={**os.environ, **environment}, **output)
    if quiet and done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace"))
    return done.returncode


def ensure_debian(sessions: list[str]) -> None:
    """Installs the Debian packages that are missing, or says which."""
    wanted = {session.split("(")[0] for session in sessions}
    missing = [name for name, (users, present) in DEBIAN.items() if users & wanted and not present()]
    if not missing:
        return
    install = f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        fail(f"missing system packages: {' '.join(missing)}. Install them (Debian: sudo {install}) and run this again.")
    print(f"dev.py: installing {' '.join(missing)}", flush=True)
    if run("apt-get", "update", quiet=True, DEBIAN_FRONTEND="noninteractive"):
        fail("apt-get update failed; is a package mirror reachable?")
    if run(*install.split(), quiet=True, DEBIAN_FRONTEND="noninteractive"):
        fail(f"'{install}' failed; install {' '.join(missing)} by hand.")


def ensure_tools() -> Path:
    """The interpreter of `.venv-tools`, made anew whenever its pins or the interpreter have changed."""
    python = TOOLS / "bin" / "python"
    stamp = TOOLS / "stamp"
    key = hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()
    if python.exists() and stamp.is_file() and stamp.read_text() == key:
        return python
    print(f"dev.py: making {TOOLS.name} with nox", flush=True)
    shutil.rmtree(TOOLS, ignore_errors=True)
    # Without pip in it: Debian's Python has no ensurepip. The pip of this interpreter installs into it.
    if run(sys.executable, "-m", "venv", "--without-pip", TOOLS, quiet=True):
        fail(f"{sys.executable} -m venv failed (above).")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "-r", str(PINS)]
    if run(*pip, quiet=True):
        fail(f"pip could not install {PINS.relative_to(ROOT)} (above); it needs pip 22.3 or newer and a package index.")
    stamp.write_text(key)
    return python


def usage() -> str:
    lines = ["usage: python3 tools/dev.py COMMAND [-- ARGUMENTS]", ""]
    lines += [f"  {name:12} {text}" for name, (text, _) in COMMANDS.items()]
    lines += [
        "",
        "Arguments after -- go to what the session runs (weft demo, pytest):",
        "  python3 tools/dev.py demo -- --steps 3 --transport gloo",
        "  python3 tools/dev.py 'tests(core)' -- -k planner",
        "Environments live in .nox/ and are made anew when what they hold has changed.",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036
        fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]} ({sys.executable}).")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, passed = arguments[:split], arguments[split:]
    sessions: list[str] = []
    for name in names:
        if name.startswith("-"):
            fail(f"unknown option {name!r}; arguments for the session come after --")
        if name.split("(")[0] not in COMMANDS:
            fail(f"unknown command {name!r}; one of: {', '.join(COMMANDS)}")
        sessions += COMMANDS[name][1] if name in COMMANDS else [name]
    ensure_debian(sessions)
    nox = [str(ensure_tools()), "-m", "nox", "-f", str(ROOT / "noxfile.py")]
    if names == ["test"] and not passed:
        files = sorted(file.relative_to(ROOT) for file in (ROOT / "integration-tests").glob("test_*.py"))
        return side_by_side.run_all(nox, side_by_side.jobs(side_by_side.listed(nox, sessions, ROOT), files), ROOT)
    return run(*nox, "-s", *dict.fromkeys(sessions), *passed)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
