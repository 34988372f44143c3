"""A fleet in which the replica that is struck is a vLLM engine of one worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from support.checkpoints import Checkpoints
from support.engine_stops import install
from support.fleet import SOURCES, STRUCK, Company

ENGINE = "engine"
"""Who says what is served: the process that has the `LLM`. Frozen and killed, all processes of the engine are."""
WORKER = "worker"
"""The process that has the weights: the replica's only member, and who stops at steps."""
COUNT = 6
"""Checkpoints."""
START_SECONDS = 300.0
"""For an engine on a busy machine."""
ROOT = Path(__file__).resolve().parents[1]


class EngineProcess:
    """The processes of an engine, which share a session."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        with log.open("a") as stream:
            self._process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pid = self._process.pid

    def is_alive(self) -> bool:
        """Whether the first one runs."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """A signal to all of them."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        if self.is_alive():
            self.send(signal.SIGKILL)

    def join(self, seconds: float) -> None:
        """Wait for the end of the first one."""
        self._process.wait(seconds)


@dataclass(eq=False)
class EngineCompany(Company):
    """The `Company` of an engine, beside which all others are the cheap ones."""

    _folder: TemporaryDirectory[str] = field(default_factory=TemporaryDirectory)
    _shared: set[Path] = field(default_factory=set)
    """Memory of the engine that outlives it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._path = Path(self._folder.name)
        install(self._path / "plugins")
        self._environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "PYTHONPATH": os.pathsep.join([str(self._path / "plugins"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        made = [sys.executable, "-m", "vllm_engine.answers", str(self._path / "checkpoints"), str(COUNT)]
        subprocess.run(made, env=self._environment, check=True, timeout=START_SECONDS)
        self.model = Checkpoints(str(self._path / "checkpoints"), COUNT)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._folder.cleanup()

    def start(self, *names: str, size: int = 1) -> None:
        """As `Company.start`. The engine returns when it is about to join for the first time."""
        super().start(*(name for name in names if name != ENGINE), size=size)
        if ENGINE in names:
            self._start_engine()

    def _start_engine(self) -> None:
        if ENGINE in self._processes:
            self.kill(ENGINE)
        address = self._path / "engine"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen()
            listener.settimeout(1.0)
            limits = dict.fromkeys(("begin", "move", "vote", "commit"), self.limits)
            options = {"transport": self.transport, "transport_options": self.options, "address": str(address)}
            init_info = {
                "store": self.store, "job": self.job, "replica": STRUCK, "sources": len(SOURCES), "fleet": True,
                "transport": "stopping", "transport_options": options, "policy": {"landing": self.landing},
                "deadlines": {"rendezvous": 120.0, "offer": 300.0, **limits},
            }  # fmt: skip
            command = [sys.executable, "-m", "support.engine_replica", str(address), self.model.folder, str(COUNT)]
            engine = EngineProcess([*command, json.dumps(init_info)], self._environment, self._path / "log")
            self._processes[ENGINE] = engine
            self._pipes[ENGINE], self._pipes[WORKER], self._struck[WORKER] = (
                self._accepted(listener, engine) for _ in range(3)
            )
        self._struck[ENGINE] = self._struck[WORKER]
        self.said[ENGINE], self.said[WORKER] = [], []
        self._worker = psutil.Process(self.until(WORKER, "here")[1])
        self._lives = self._living()
        self._shared = {path for pid in self._lives for path in _shared_memory(pid)}

    def _accepted(self, listener: socket.socket, engine: EngineProcess) -> Connection:
        """The next connection: of the engine, of its worker, and the worker's other one."""
        limit = time.monotonic() + START_SECONDS
        while True:
            try:
                return Connection(listener.accept()[0].detach())
            except TimeoutError:
                words = (self._path / "log").read_text(errors="replace")[-4000:]
                assert engine.is_alive(), f"the engine has ended: {words}"
                assert time.monotonic() < limit, f"the engine has not come up: {words}"

    def _living(self) -> set[int]:
        """Processes of the engine."""
        return {process.pid for process in psutil.Process(self._processes[ENGINE].pid).children(recursive=True)}

    def kill(self, name: str) -> None:
        """SIGKILL. The engine goes with its worker, by itself."""
        if name == WORKER:
            self._worker.kill()
            return
        super().kill(name)
        if name == ENGINE:
            self._pipes[WORKER].close()
            for path in self._shared:  # nobody is left who would
                path.unlink(missing_ok=True)

    def freeze(self, name: str) -> None:
        """SIGSTOP."""
        if name == ENGINE:
            self._processes[ENGINE].send(signal.SIGSTOP)
        else:
            super().freeze(name)

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        if name == ENGINE:
            self._processes[ENGINE].send(signal.SIGCONT)
        else:
            super().thaw(name)

    def _strike(self, name: str, number: int) -> None:
        if name == WORKER:
            self._worker.send_signal(number)
            assert self._struck[WORKER].poll(60), f"the worker has not been struck: {self.said}"
            self._struck[WORKER].recv()
        else:
            super()._strike(name, number)

    def gone(self) -> list[str]:
        """As `Company.gone`; of the engine, every process that it had when it came up."""
        return [*super().gone(), *(f"{pid} of the engine" for pid in sorted(self._lives - self._living()))]


def _shared_memory(pid: int) -> set[Path]:
    """What a process has mapped of it."""
    words = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {Path(each[5]) for each in words if len(each) == 6 and each[5].startswith("/dev/shm/")}
