"""One `AsyncLLM`: refits while requests run, in every pause mode. Prints one line of JSON.

Run as `python async_case.py '{"family": "qwen3", "transport": "gloo", "tp": 1}' DIRECTORY`; `test_vllm_async.py` does.
With `"dp": 2` it has two data-parallel engines, and every other request is for the second one; with `"ep": true` they
share experts.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from models import prompts, save_checkpoint
from refit_case import DEADLINES
from sources import SourceProcesses
from target_case import compare, remove, shared_memory
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

import weft_vllm
from weft.store_server import serve_store

SECONDS = 240.0
"""For what happens in the engines: those that share experts compute in step, and slowly where processors are few."""


def spoil_commit(worker: Any, spoilt: bool) -> None:
    """In a worker: have it fail once the engine is paused and its weights have been written, or no more."""
    target = worker.weight_transfer_engine._target

    def fail(version: int) -> None:
        raise RuntimeError("a weight has moved")

    if spoilt:
        target.prepare_commit = fail
    else:
        del target.prepare_commit


class Request:
    """One that runs, and what it has got so far."""

    def __init__(self, engine: AsyncLLM, name: str, prompt: list[int], tokens: int, rank: int) -> None:
        self.prompt, self.got, self.ended = prompt, [], ""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
        self._answers = engine.generate({"prompt_token_ids": prompt}, sampling, name, data_parallel_rank=rank)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async for answer in self._answers:
            self.got = list(answer.outputs[0].token_ids)
            self.ended = str(answer.outputs[0].finish_reason)


class Case:
    """The engine under test and its sources. Version 0 is "A"."""

    def __init__(self, case: dict[str, Any], directory: Path, store: str) -> None:
        self.directory = directory
        self.engines, self.tokens = case.get("dp", 1), case["tokens"]
        options = {"family": case["family"], "tied": True, "kv_heads": 2, "dtype": torch.float32}
        self.models = {n: save_checkpoint(directory / n, seed=seed, **options) for seed, n in enumerate("AB", 1)}
        shared = {"store": store, "job": "case", "transport": case["transport"], "deadlines": DEADLINES}
        shared |= {"policy": {"landing": "shadow"}, "replicas": 1 if case.get("ep") else self.engines}
        self.init = {"replica": "rollout0", "sources": 1, **shared}
        self.sources = SourceProcesses(1, self.weights("A"), **shared)
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                str(directory / "A"), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=512,
                block_size=32, enable_prefix_caching=True, weight_transfer_config={"backend": "weft"},
                data_parallel_size=self.engines, enable_expert_parallel=case.get("ep", False),
                distributed_executor_backend="uni",
            )
        )  # fmt: skip
        self.control = weft_vllm.async_control(self.engine)
        self.count = 0

    def weights(self, name: str) -> str:
        return str(self.directory / name / "model.safetensors")

    def request(self, prompt: list[int], tokens: int, number: int = 0) -> Request:
        self.count += 1
        return Request(self.engine, f"request{self.count}", prompt, tokens, number % self.engines)

    def running(self, version: int) -> list[Request]:
        """Two that are to run when a refit pauses them, one for each of two engines."""
        asked = prompts(2, 70, seed=version)
        return [self.request(prompt, self.tokens, number) for number, prompt in enumerate(asked)]

    async def every(self, call: Any, *arguments: Any) -> list[Any]:
        """A function's answer in every worker of every engine."""
        return await self.control._workers(call, arguments)

    async def fetched(self, version: int, name: str) -> None:
        self.sources.send("offer", version, self.weights(name))
        await until(self._is_ready(version))

    def _is_ready(self, version: int) -> Callable[[], Awaitable[bool]]:
        async def ready() -> bool:
            return await self.control.ready() == version

        return ready

    async def refit(self, version: int, before: str, after: str, mode: str) -> dict[str, Any]:
        """One refit beside requests that run; what each of their tokens falls behind the best one, by version."""
        await self.fetched(version, after)
        running = self.running(version)
        await until(lambda: at_once(all(len(request.got) > 4 for request in running)))

        late: list[Request] = []
        update_weight_version = self.engine.update_weight_version

        async def while_paused(new_version: str) -> None:
            late.extend(self.request(prompts(1, 70, seed=version)[0], 16, rank) for rank in range(self.engines))
            await asyncio.sleep(0.1)  # until it waits in the engine
            await update_weight_version(new_version)

        with patch.object(self.engine, "update_weight_version", while_paused):
            report = await self.control.refit(version, mode=mode)
        await asyncio.wait_for(asyncio.gather(*(request.task for request in [*running, *late])), SECONDS)
        behind = {name: [self.behind(name, request) for request in running] for name in (before, after)}
        return {
            "version": report.version, "before": behind[before], "after": behind[after],
            "ended": [request.ended for request in running], "lengths": [len(request.got) for request in running],
            "late": [each for request in late for each in self.behind(after, request)],
            "sent": self.sources.answers(), "digest": report.digest,
            "memory": await self.every(compare, str(self.directory / after), self.models[after].config.to_dict()),
            "pause": report.pause_seconds, "seconds": dict(report.seconds),
        }  # fmt: skip

    async def failure(self, version: int) -> dict[str, Any]:
        """A refit that fails when weights have been written already, with requests kept."""
        await self.every(spoil_commit, True)
        await self.fetched(version, "A")
        running = self.running(version)
        await until(lambda: at_once(all(len(request.got) > 4 for request in running)))
        said = await failing(self.control.refit(version, mode="keep"))
        await asyncio.wait_for(asyncio.gather(*(request.task for request in running)), SECONDS)
        refused = await failing(self._ask())
        await self.every(spoil_commit, False)
        self.sources.answers()
        return {
            "said": said, "refused": refused, "ended": [request.ended for request in running],
            "kept": [each for request in running for each in self.behind("B", request)],
        }  # fmt: skip

    async def interrupted(self, version: int) -> dict[str, Any]:
        """A refit from "A" to "B" that is interrupted once weights have been written, with requests kept; then somebody
        resumes, and "A" comes again.
        """
        await self.fetched(version, "B")
        running = self.running(version)
        await until(lambda: at_once(all(len(request.got) > 4 for request in running)))

        async def interrupt(new_version: str) -> None:
            raise asyncio.CancelledError

        with patch.object(self.engine, "update_weight_version", interrupt):
            await asyncio.gather(asyncio.create_task(self.control.refit(version, mode="keep")), return_exceptions=True)
        self.sources.answers()
        resumed = await failing(self.control.resume(version - 1))
        self.sources.send("offer", version + 1, self.weights("A"))
        await self.control.refit(version + 1, mode="keep")
        self.sources.answers()
        await asyncio.wait_for(asyncio.gather(*(request.task for request in running)), SECONDS)
        return {
            "resumed": resumed, "ended": [request.ended for request in running],
            "behind": [each for request in running for each in self.behind("A", request)],
        }  # fmt: skip

    async def _ask(self) -> None:
        await self.request(prompts(1, 70)[0], 4).task

    @torch.no_grad()
    def behind(self, name: str, request: Request) -> list[float]:
        """Per token: how far its logit is from the best one of a version, given all tokens before it."""
        sequence = torch.tensor([request.prompt + request.got])
        logits = self.models[name](sequence).logits[0, len(request.prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(request.got)[:, None])[:, 0]
        return (logits.max(dim=1).values - chosen).tolist()

    async def run(self) -> dict[str, Any]:
        self.sources.send("open")
        await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(self.init))
        assert self.sources.answers() == ["open"]
        refits = {
            "abort": await self.refit(1, "A", "B", "abort"),
            "wait": await self.refit(2, "B", "A", "wait"),
            "keep": await self.refit(3, "A", "B", "keep"),
        }
        failed = await self.failure(4)
        self.sources.send("offer", 5, self.weights("A"))
        await self.control.refit(5)
        self.sources.answers()
        request = self.request(prompts(1, 70)[0], 16)
        await asyncio.wait_for(request.task, SECONDS)
        repaired = self.behind("A", request)
        return {"refits": refits, "failed": failed, "repaired": repaired, "interrupted": await self.interrupted(6)}


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    """Poll, with a deadline."""

    async def poll() -> None:
        while not await reached():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), SECONDS)


async def at_once(value: bool) -> bool:
    return value


async def failing(call: Awaitable[Any]) -> str:
    """What a call raises, as text."""
    try:
        await asyncio.wait_for(call, SECONDS)
    except Exception as error:  # noqa: BLE001 - the test asserts on what it says
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


async def main() -> None:
    server = serve_store(host="127.0.0.1", port=0)
    case = Case(json.loads(sys.argv[1]), Path(sys.argv[2]), server.url)
    with case.sources:
        print("RESULT " + json.dumps(await case.run(), default=str), flush=True)
    shared = await case.every(shared_memory)
    case.engine.shutdown()
    remove(shared)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
