"""The demo as users start it: a process, its exit code, its JSON, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

SECONDS = 280


class Demo:
    """`weft demo <arguments>` as a process, temporary files in `directory`; remembers all that it starts and shares."""

    def __init__(self, *arguments: str, directory: Path) -> None:
        self.directory = directory
        self._printed = directory / "printed"
        with self._printed.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weft_cli.app", "demo", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(directory)},
                # Where the tests run in a shell's background, SIGINT is ignored, and so it would be here.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self._started: dict[int, psutil.Process] = {}
        self.shared: set[str] = set()

    @property
    def printed(self) -> str:
        """Everything it has printed."""
        return self._printed.read_text(errors="replace")

    def watch(self, ready: Callable[[], bool], seconds: float) -> None:
        """Note processes and shared memory until `ready`, or the demo's end; when it is late it is interrupted."""
        until = time.monotonic() + seconds
        while not ready() and self.process.poll() is None:
            if time.monotonic() > until:
                self.process.send_signal(signal.SIGINT)
                self.process.wait(60)
                raise AssertionError(f"not within {seconds} s:\n{self.printed}")
            with suppress(psutil.Error):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    self._started[child.pid] = child
            for child in self._started.values():
                with suppress(psutil.Error):
                    maps = child.memory_maps()
                    self.shared |= {area.path for area in maps if area.path.startswith("/dev/shm/")}
            time.sleep(0.2)

    def finish(self, seconds: float) -> int:
        """Its exit code."""
        self.watch(lambda: False, seconds)
        return self.process.wait(1)

    def assert_nothing_is_left(self) -> None:
        """No process, no shared memory, no temporary file."""
        assert self._started
        _, alive = psutil.wait_procs(list(self._started.values()), timeout=5)
        assert alive == []
        assert [path for path in self.shared if Path(path).exists()] == []
        assert list(self.directory.glob("weft-demo-*")) == []


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.trap(13, 14, 28, 29, 54, 55)
def test_over_nixl_the_model_learns_and_the_engine_follows(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    demo = Demo("--steps", "8", "--seed", "3", "--json", str(result), directory=tmp_path)
    assert demo.finish(SECONDS) == 0, demo.printed
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
    assert all(f"{version:7d}  " in demo.printed for version in range(9))
    demo.assert_nothing_is_left()


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.trap(4, 6, 13, 28, 29, 54)
def test_a_mixture_of_experts_learns_and_the_engine_follows(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    demo = Demo("--model", "moe", "--steps", "4", "--json", str(result), directory=tmp_path)
    assert demo.finish(SECONDS) == 0, demo.printed
    found = json.loads(result.read_text())
    assert (found["model"], found["versions"]) == ("moe", [1, 2, 3, 4])
    assert found["tokens_equal"] is True
    assert found["tokens_compared"] == 256
    assert found["max_logprob_difference"] <= found["logprob_bound"]
    assert found["compared_bytes"] >= found["bytes_per_refit"] > 15_000_000
    assert (found["mismatched_bytes"], found["mismatched_parameters"]) == (0, [])
    assert found["reward_last"] > found["reward_frozen"]
    assert len(set(found["digests"])) == 4
    assert (found["warm_registrations"], found["warm_allocations"]) == (0, 0)
    demo.assert_nothing_is_left()


@pytest.mark.timeout(SECONDS + 60)
def test_one_damaged_byte_is_found_and_fails_the_demo_over_gloo(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    demo = Demo("--transport", "gloo", "--steps", "2", "--flip-byte", "--json", str(result), directory=tmp_path)
    assert demo.finish(SECONDS) == 1, demo.printed
    found = json.loads(result.read_text())
    assert found["transport"] == "gloo"
    assert found["mismatched_bytes"] == 1
    (fault,) = found["mismatched_parameters"]
    assert found["flipped"] in fault
    assert any("1 bytes" in words for words in found["failures"])
    demo.assert_nothing_is_left()


@pytest.mark.timeout(SECONDS)
def test_an_interrupt_leaves_no_process_and_no_shared_memory(tmp_path: Path) -> None:
    demo = Demo(directory=tmp_path)
    # vLLM's workers share memory with one another once they have started.
    demo.watch(lambda: any("cpushm" in path for path in demo.shared), SECONDS / 2)
    demo.process.send_signal(signal.SIGINT)
    assert demo.finish(60) == 130, demo.printed
    assert any("cpushm" in path for path in demo.shared), demo.printed
    demo.assert_nothing_is_left()
