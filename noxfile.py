"""The sessions of this repository. `python3 tools/dev.py` makes nox and runs them; `nox -l` lists them.

Sessions share environments, so they make their own: `.nox/<name>`, from `constraints/<file>.txt`, remade when the
constraints or the metadata of the packages they hold have changed (editable entry points freeze at install).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from distributions import Package, closure, discover  # noqa: E402

NOX = ROOT / ".nox"
DIST = NOX / "dist"
THIRD_PARTY = ROOT / "integration-tests" / "third_party"
# Where pip finds an environment's build of torch if the configured index has it not. Those for GPUs are unproven.
TORCH_INDEX = {"gpu12": "https://download.pytorch.org/whl/cu126", "gpu13": "https://download.pytorch.org/whl/cu130"}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_DRIVER = {12: 525, 13: 580}
GPU_PACKAGES = ("core", "cudamalloc", "gloo", "mapped", "nccl", "nixl")

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "types", "tests"]
# Environments are installed without bytecode. Unless the first import may write it, every process of an engine compiles
# torch, Transformers and vLLM anew, which doubles the time of its tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Waits until no other nox makes environment `name`: `tools/dev.py test` runs two."""
    NOX.mkdir(exist_ok=True)
    with (NOX / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment(session: nox.Session, name: str, constraints: str, packages: list[Package], extra: str = "") -> Path:
    """The interpreter of environment `.nox/<name>`, which holds `packages`, editable, the last of them with `extra`."""
    with alone(name):
        return made_environment(session, name, constraints, packages, extra)


def made_environment(session: nox.Session, name: str, constraints: str, packages: list[Package], extra: str) -> Path:
    """That interpreter, of an environment that is made unless it is there already.

    With constraints of its own (an engine's) everything in the file is installed first, as it stands: engines ask for
    what breaks them. With `light` pip installs what the packages declare and nothing else, at the file's versions.
    """
    started = time.monotonic()
    folder, pins = NOX / name, ROOT / "constraints" / f"{constraints}.txt"
    python, stamp = folder / "bin" / "python", folder / "stamp"
    build_pins = ROOT / "constraints" / "build.txt"
    held = [pins, build_pins, *(package.path / "pyproject.toml" for package in packages)]
    held += [file for package in packages for file in sorted(package.path.glob("src/*/*.c"))]  # compiled at install
    key = hashlib.sha256(b"".join(file.read_bytes() for file in held) + sys.version.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == key:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    session.run(sys.executable, "-m", "virtualenv", "-q", "--no-periodic-update", str(folder), external=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--no-compile"]
    torch = [line for line in pins.read_text().splitlines() if line.startswith("torch==")]
    if torch:
        index = TORCH_INDEX.get(constraints, TORCH_CPU_INDEX)
        try:
            session.run(*pip, "-c", str(pins), *torch, external=True)
        except nox.command.CommandFailed:
            session.run(*pip, "-c", str(pins), *torch, "--extra-index-url", index, external=True)
    if constraints != "light":
        session.run(*pip, "--no-deps", "-r", str(pins), external=True)
    if packages:
        editable = [str(package.path) for package in packages]
        if extra:
            editable[-1] += f"[{extra}]"
        arguments = [argument for path in editable for argument in ("-e", path)]
        session.run(*pip, "-c", str(pins), "--build-constraint", str(build_pins), *arguments, external=True)
    stamp.write_text(key)
    session.log(f"environment {name} installed in {time.monotonic() - started:.0f} s")
    return python


def engines(session: nox.Session) -> Path:
    """The one environment that holds everything."""
    return environment(session, "engines", "engines", discover())


def pytest(session: nox.Session, python: Path, folder: Path) -> None:
    """Runs the tests in `folder`, or those of its files that are among the arguments; having none is an error."""
    if not any(folder.glob("**/test_*.py")):
        session.error(f"{folder.relative_to(ROOT)} has no tests")
    named = any(argument.startswith(f"{folder.relative_to(ROOT)}/") for argument in session.posargs)
    places = [] if named else [str(folder)]
    session.run(str(python), "-m", "pytest", *places, *session.posargs, external=True)


def older_vllm(session: nox.Session) -> None:
    """The series of vLLM before the one in `engines`: weft-vllm's unit tests, and refits of real engines over gloo."""
    held = [each for each in discover() if each.short in ("core", "gloo", "vllm")]
    python = environment(session, "vllm31", "vllm31", held, "test")
    pytest(session, python, ROOT / "packages" / "adapters" / "vllm" / "tests")
    refits = str(ROOT / "integration-tests" / "test_vllm_refit.py")
    session.run(str(python), "-m", "pytest", refits, "-k", "gloo", *session.posargs, external=True)


def older_numpy(session: nox.Session, python: Path) -> Path:
    """A folder with a numpy that tests put in front of the environment's own."""
    folder = NOX / "older-numpy"
    if not folder.is_dir():
        pins = ROOT / "constraints" / "older-numpy.txt"
        pip = [str(python), "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder)]
        session.run(*pip, "-r", str(pins), external=True)
    return folder


def newest_vllm(session: nox.Session) -> Path:
    """The interpreter of an environment with vLLM 0.33 for GPUs, which needs another torch than the rest.

    Without a constraints file: what it asks for was not on every index when this was written. Never installed yet.
    """
    python = NOX / "vllm33" / "bin" / "python"
    if not python.exists():
        session.run(
            sys.executable, "-m", "virtualenv", "-q", "--no-periodic-update", str(NOX / "vllm33"), external=True
        )
    extras = {"core": "", "gloo": "", "nixl": "[cu13]", "vllm": "[test]"}
    held = [f"{each.path}{extras[each.short]}" for each in discover() if each.short in extras]
    arguments = [argument for path in held for argument in ("-e", path)]
    session.run(str(python), "-m", "pip", "install", "-qq", "vllm==0.33.*", *arguments, external=True)
    return python


def run_all(session: nox.Session, commands: list[list[str]], env: dict[str, str]) -> None:
    """Runs all commands, then fails if one of them has failed."""
    failed = []
    for command in commands:
        try:
            session.run(*command, external=True, env=env)
        except nox.command.CommandFailed:
            failed.append(" ".join([Path(command[0]).name, *command[1:]]))
    if failed:
        session.error(f"failed: {'; '.join(failed)}")


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """ruff, import contracts, lockstep versions, constraints up to date."""
    python = environment(session, "lint", "lint", [])
    tools = python.parent
    sources = ":".join(str(package.path / "src") for package in discover())
    commands = [
        [str(tools / "ruff"), "check", "."],
        [str(tools / "ruff"), "format", "--check", "."],
        [str(tools / "lint-imports")],
        [str(python), "tools/bump.py", "--check"],
        [str(python), "tools/constraints.py", "--check"],
    ]
    run_all(session, commands, {"PYTHONPATH": sources})


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """mypy --strict, per package and for the third party's, against the real torch."""
    mypy = environment(session, "lint", "lint", []).parent / "mypy"
    command = [str(mypy), "--strict", "--python-executable", str(engines(session)), "-p"]
    sources = ":".join([*(str(package.path / "src") for package in discover()), str(THIRD_PARTY / "src")])
    names = [*(package.import_name for package in discover()), "example_weft_sockets"]
    run_all(session, [[*command, name] for name in names], {"MYPYPATH": sources})


@nox.session(python=False)
@nox.parametrize(
    "package", [nox.param(name, id=name) for name in ("tools", "vllm31", *(each.short for each in discover()))]
)
def tests(session: nox.Session, package: str) -> None:
    """Unit tests of one package, in an environment that holds it, what it declares, its test extra and its engine."""
    if package == "tools":
        pytest(session, environment(session, "lint", "lint", []), ROOT / "tools" / "tests")
        return
    if package == "vllm31":
        older_vllm(session)
        return
    (found,) = [each for each in discover() if each.short == package]
    constraints = package if (ROOT / "constraints" / f"{package}.txt").is_file() else "light"
    python = environment(session, package, constraints, closure(found), "test")
    if package == "core":
        session.env["WEFT_OLDER_NUMPY"] = str(older_numpy(session, python))
    pytest(session, python, found.path / "tests")


@nox.session(python=False)
def integration(session: nox.Session) -> None:
    """Real Megatron-Core, vLLM and NIXL together; after --, files and pytest's options, such as -k refit."""
    pytest(session, engines(session), ROOT / "integration-tests")


@nox.session(python=False)
def wheels(session: nox.Session) -> None:
    """Build every sdist, and from it the wheel; install them, and a third party's, without an index; discover."""
    builder = environment(session, "build", "build", [])
    shutil.rmtree(DIST, ignore_errors=True)
    for package in discover():
        session.run(
            str(builder),
            "-m",
            "build",
            "-q",
            "--no-isolation",
            "--outdir",
            str(DIST),
            str(package.path),
            external=True,
            silent=True,
        )
    python = environment(session, "wheels", "engines", [])
    pip = [str(python), "-m", "pip"]
    example = NOX / "third_party"  # a copy, since setuptools leaves its work in the folder
    shutil.rmtree(example, ignore_errors=True)
    shutil.copytree(THIRD_PARTY, example)
    wheel = [*pip, "wheel", "-qq", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(DIST)]
    session.run(*wheel, str(example), external=True, silent=True)
    names = [*(package.name for package in discover()), "example-weft-sockets"]
    session.run(*pip, "uninstall", "-qq", "-y", *names, external=True, silent=True)
    session.run(*pip, "install", "-qq", "--no-index", "--find-links", str(DIST), *names, external=True)
    session.run(str(python), "tools/check_plugins.py", external=True)
    session.run(str(python.parent / "weft"), "plugins", "--json", external=True)


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """weft demo, with the arguments after --."""
    session.run(str(engines(session).parent / "weft"), "demo", *session.posargs, external=True)


@nox.session(python=False)
def faults(session: nox.Session) -> None:
    """The whole fault matrix, or the rows that have all values after --, into docs/fault-matrix.json and its page."""
    command = [str(engines(session)), "-m", "support.fault_matrix", str(ROOT / "docs" / "fault-matrix.json")]
    session.run(*command, *session.posargs, external=True, env={"PYTHONPATH": str(ROOT / "integration-tests")})
    session.run(sys.executable, "tools/fault_matrix.py", external=True)


@nox.session(python=False)
@nox.parametrize("module", [nox.param("soak", id="memory"), nox.param("vllm_soak", id="vllm")])
def soak(session: nox.Session, module: str) -> None:
    """Refits under random faults, 1,000 of cheap targets or some of a real engine, with the arguments after --."""
    arguments = session.posargs or ["--out", str(NOX / f"{module}.json")]
    command = [str(engines(session)), "-m", f"support.{module}", *arguments]
    session.run(*command, external=True, env={"PYTHONPATH": str(ROOT / "integration-tests")})


@nox.session(python=False)
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link is an error."""
    python = environment(session, "docs", "docs", [])
    session.run(str(python.parent / "zensical"), "build", "--strict", "--clean", external=True)


def gpu_fault(cuda: int, capability: int) -> str:
    """Why this machine cannot run the tests for CUDA `cuda` on sm`capability`; empty if it can."""
    if shutil.which("nvidia-smi") is None:
        return "this machine has no NVIDIA driver (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=compute_cap,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [line.split(", ") for line in answer.stdout.splitlines() if line.count(", ") == 1]
    if answer.returncode or not rows:
        return f"nvidia-smi lists no GPU: {(answer.stdout + answer.stderr).strip()}"
    found = sorted({f"sm{row[0].replace('.', '')}" for row in rows})
    if f"sm{capability}" not in found:
        return f"sm{capability} asked, this machine has {', '.join(found)}"
    if int(rows[0][1].split(".")[0]) < OLDEST_DRIVER[cuda]:
        return f"CUDA {cuda} needs driver {OLDEST_DRIVER[cuda]}, this machine has {rows[0][1]}"
    return ""


@nox.session(python=False)
@nox.parametrize("capability", [80, 90, 100], ids=["sm80", "sm90", "sm100"])
@nox.parametrize("cuda", [12, 13], ids=["cuda12", "cuda13"])
def gpu(session: nox.Session, cuda: int, capability: int) -> None:
    """Tests marked gpu, on one CUDA version and one kind of GPU."""
    fault = gpu_fault(cuda, capability)
    if fault:
        session.skip(fault)
    python = environment(
        session, f"gpu{cuda}", f"gpu{cuda}", [each for each in discover() if each.short in GPU_PACKAGES]
    )
    folders = [str(each.path / "tests") for each in discover() if each.short in GPU_PACKAGES]
    folders.append(str(ROOT / "integration-tests" / "test_gpu.py"))
    session.run(str(python), "-m", "pytest", "-m", "gpu", *folders, *session.posargs, external=True)
    if cuda == 13:  # the CUDA of its wheels
        engine = str(ROOT / "integration-tests" / "test_vllm_refit.py")
        session.run(str(newest_vllm(session)), "-m", "pytest", "-m", "gpu", engine, *session.posargs, external=True)
