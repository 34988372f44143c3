"""The demo as users start it: a process, its exit code, its JSON, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 280


def start(*arguments: str, directory: Path) -> subprocess.Popen[str]:
    """`weft demo <arguments>` with its temporary files in `directory`."""
    return subprocess.Popen(
        [sys.executable, "-m", "weft_cli.app", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(directory)},
    )


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """Everything it printed. It is interrupted, not killed, when it is late: so it can end what it started."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
        raise AssertionError(f"not within {seconds} s:\n{printed}") from None


def processes_in(directory: Path) -> set[int]:
    """Processes whose environment names `directory`: the demo's own, and everything that it started."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if f"TMPDIR={directory}\0".encode() in environment + b"\0":
                found.add(int(entry.name))
    return found


def shared_memory_of(processes: set[int]) -> set[str]:
    """Files under /dev/shm that these processes have mapped."""
    found: set[str] = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found |= {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line}
    return {path for path in found if not path.endswith(" (deleted)")}


def assert_nothing_is_left(directory: Path) -> None:
    """No process and no temporary file of the demo."""
    until = time.monotonic() + 5
    while processes_in(directory) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_in(directory) == set()
    assert list(directory.glob("weft-demo-*")) == []


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.trap(13, 14, 28, 29, 54, 55)
def test_over_nixl_the_model_learns_and_the_engine_follows(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    process = start("--steps", "8", "--seed", "3", "--json", str(result), directory=tmp_path)
    printed = finish(process, SECONDS)
    assert process.returncode == 0, printed
    found = json.loads(result.read_text())
    assert found["transport"] == "nixl"
    assert found["versions"] == list(range(1, 9))
    assert found["tokens_equal"] is True
    assert found["tokens_compared"] == 256
    assert found["ties"] < 10
    assert found["max_logprob_difference"] <= found["logprob_bound"]
    assert found["compared_bytes"] >= found["bytes_per_refit"] > 10_000_000
    assert (found["mismatched_bytes"], found["mismatched_parameters"]) == (0, [])
    assert found["reward_last"] > found["reward_frozen"] + 0.05
    assert len(found["refit_seconds"]) == len(set(found["digests"])) == 8
    assert found["warm_registrations"] == 0
    assert found["warm_allocations"] == 0
    assert all(f"{version:7d}  " in printed for version in range(9))
    assert_nothing_is_left(tmp_path)


@pytest.mark.timeout(SECONDS + 60)
def test_one_damaged_byte_is_found_and_fails_the_demo_over_gloo(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    process = start(
        "--transport", "gloo", "--steps", "2", "--flip-byte", "--json", str(result), directory=tmp_path
    )  # fmt: skip
    printed = finish(process, SECONDS)
    assert process.returncode == 1, printed
    found = json.loads(result.read_text())
    assert found["transport"] == "gloo"
    assert found["mismatched_bytes"] == 1
    (fault,) = found["mismatched_parameters"]
    assert found["flipped"] in fault
    assert any("1 bytes" in words for words in found["failures"])
    assert_nothing_is_left(tmp_path)


@pytest.mark.timeout(SECONDS)
def test_an_interrupt_leaves_no_process_and_no_shared_memory(tmp_path: Path) -> None:
    process = start("--transport", "gloo", directory=tmp_path)
    shared: set[str] = set()
    until = time.monotonic() + SECONDS / 2
    # vLLM's workers share memory with their engine as soon as they have started; nothing has met yet.
    while not any("cpushm" in path for path in shared) and time.monotonic() < until and process.poll() is None:
        shared |= shared_memory_of(processes_in(tmp_path))
        time.sleep(0.05)
    assert any("cpushm" in path for path in shared), finish(process, 1)
    process.send_signal(signal.SIGINT)
    printed = finish(process, 60)
    assert process.returncode == 130, printed
    assert_nothing_is_left(tmp_path)
    assert [path for path in shared if Path(path).exists()] == []
