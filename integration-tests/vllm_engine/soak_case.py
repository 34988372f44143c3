"""An `AsyncLLM` whose clients ask all the time, while a trainer refits it and faults are done to both. Prints one line
of JSON.

Run as `python soak_case.py '{"seed": 1, "drive": "published", "transport": "nixl", "refits": 40, …}' DIRECTORY`;
`support.vllm_soak` does. Every token names the version of the weights that it was computed with (`coded.py`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coded import CODES, POSITIONS, VOCABULARY, Coded, token_of
from ledger import Ledger
from soak_faults import Strikes
from soak_trainer import Job, Trainer
from soak_worker import calm, flips, join, processes
from support.fault_matrix import Store
from target_case import remove, shared_memory
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

import weft_vllm
from weft.deadline import Deadlines
from weft_vllm.steps import RefusedError

DEADLINES = {"rendezvous": 120.0, "offer": 6.0, "begin": 5.0, "move": 5.0, "vote": 5.0, "commit": 5.0}
PATIENT = Deadlines(**{**DEADLINES, "begin": 14.0})
"""Of the engine's control: a pause waits for requests, but not for longer than sources do."""
BUCKET_BYTES = 64 * 1024
"""A version is some 30 buckets, so that faults come between them."""
BETWEEN_SECONDS = 0.4
"""From one refit to the next, in the mean."""
STREAMS = 4
PROMPTS = 6
"""So few that later requests find their beginnings in the cache."""
REQUEST_SECONDS = 240.0
"""A request that takes longer is lost."""
QUIET_SECONDS = 240.0
"""After faults stop the engine must serve the newest version by then."""
FAILURES = 2
"""In a row, before trainer and engine join anew."""


class Soak:
    """One engine in one drive, in every pause mode. Version 0 is what the engine loads."""

    def __init__(self, case: dict[str, Any], directory: Path, store: Store) -> None:
        self.case, self.directory, self.store = case, directory, store
        self.random = random.Random(case["seed"])
        self.published = case["drive"] == "published"
        policy = {"bucket_bytes": BUCKET_BYTES, "landing": "in_place" if self.published else "shadow"}
        self.job = Job(case["drive"], case["transport"], policy, DEADLINES, store.url)
        coded = Coded()
        for code in range(CODES):
            coded.save(directory / str(code), code)
        self.trainer = Trainer(self.job, str(directory), CODES)
        self.version = 0
        self.refits = 0
        self.failed = 0
        """Refits in a row."""
        self.failures: Counter[str] = Counter()
        self.pauses: list[float] = []
        self.held: list[dict[str, int]] = []
        self.stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """With an engine, and nothing left behind."""
        async with AsyncExitStack() as stack:
            stack.callback(self.trainer.kill)
            self.engine = AsyncLLM.from_engine_args(
                AsyncEngineArgs(
                    str(self.directory / "0"), skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
                    max_model_len=POSITIONS, block_size=32, enable_prefix_caching=True,
                    weight_transfer_config={"backend": "weft"}, distributed_executor_backend="uni",
                )
            )  # fmt: skip
            self.control = weft_vllm.async_control(self.engine)
            stack.callback(remove, await self.worker(shared_memory))
            stack.callback(self.engine.shutdown)
            ((self.core, self.inner),) = await self.worker(processes)
            self.ledger = Ledger(token_of, lambda: self.control.refusing)
            update_weight_version = self.engine.update_weight_version

            async def committed(new_version: str) -> None:
                self.ledger.commit(int(new_version))
                await update_weight_version(new_version)

            self.engine.update_weight_version = committed  # type: ignore[method-assign]
            self.strikes = Strikes(self.random, self.trainer, self.store, self.worker, self.inner)
            yield

    async def worker(self, call: Any, *arguments: Any) -> Any:
        """What a function answers in the engine's worker, in a list."""
        return await asyncio.wait_for(self.control._workers(call, arguments), QUIET_SECONDS)

    async def run(self) -> dict[str, Any]:
        """All modes. Raises `AssertionError` when something is not as promised."""
        thawing = asyncio.create_task(self.strikes.thaw_for_ever())
        await self.join()
        await self.settle()
        streams = [asyncio.create_task(self.stream(number)) for number in range(STREAMS)]
        striking = asyncio.create_task(self.strikes.strike_for_ever(self.case["between"]))
        phases = asyncio.create_task(self.phases())
        tasks = [*streams, striking, thawing, phases]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:  # whoever fails ends it
            task.result()
        self.stopping = True
        await asyncio.wait_for(asyncio.gather(*streams), REQUEST_SECONDS)
        striking.cancel()
        thawing.cancel()
        assert not self.ledger.wrong, f"{self.where()}: {self.ledger.wrong}"
        return {**self.case, "modes": phases.result(), "held": self.held}

    async def phases(self) -> dict[str, Any]:
        """By mode."""
        return {mode: await self.phase(mode) for mode in self.case["modes"]}

    async def phase(self, mode: str) -> dict[str, Any]:
        """So many refits with one mode; what happened meanwhile."""
        began, first, refits, ledger = time.monotonic(), self.version, self.refits, self.ledger
        ledger.mode, ledger.longest, self.pauses, self.trainer.killed = mode, 0.0, [], 0
        for counter in (self.strikes.done, self.failures, ledger.counts):
            counter.clear()
        for quarter in range(1, 5):
            self.strikes.on.set()
            while self.refits - refits < self.case["refits"] * quarter / 4:
                await self.refit()
            self.strikes.on.clear()
            await self.settle()
        self.strikes.done["kill the trainer"] = self.trainer.killed
        found = {
            "refits": self.refits - refits, "versions_offered": self.version - first,
            "seconds": round(time.monotonic() - began, 1), "faults": dict(sorted(self.strikes.done.items())),
            "failures": dict(self.failures), "clients": dict(sorted(ledger.counts.items())),
            "longest_pause_seconds": round(max(self.pauses), 3),
            "longest_seconds_without_a_token": round(ledger.longest, 3),
        }  # fmt: skip
        print(f"{mode}: {found}", flush=True)
        return found

    async def settle(self) -> None:
        """Without faults: until three refits in a row have gone well."""
        await self.strikes.quiet()
        await self.worker(calm)
        limit, row = time.monotonic() + QUIET_SECONDS, 0
        while row < 3:
            row = row + 1 if await self.refit() else 0
            assert time.monotonic() < limit, f"{self.where()}: the newest version {self.version} is not installed"
        (report,) = await self.worker("weft_report")
        served = {self.version, self.ledger.version, report["version"]}
        assert len(served) == 1, f"{self.where()}: offered, committed, reported: {served}"
        three = (("client", os.getpid()), ("engine", self.core), ("worker", self.inner))
        self.held.append({"refits": self.refits} | {k: v for each in three for k, v in held(*each).items()})

    async def refit(self) -> bool:
        """Offer a version, and install it; whether that went well."""
        if self.failed >= FAILURES or self.strikes.lost_store or not (self.published or self.trainer.alive):
            await self.join()
        await asyncio.sleep(self.random.uniform(0, 2 * BETWEEN_SECONDS))
        self.version += 1
        await self.worker(flips)
        offered = asyncio.create_task(self.trainer.offer(self.version))
        self.ledger.refitting = True
        try:
            if self.published:
                await offered
            report = await self.control.refit(mode=self.ledger.mode, deadlines=PATIENT)
            assert report.version == self.ledger.version, f"{self.where()}: {report.version} is reported"
            (flipped,) = await self.worker(flips)
            assert not flipped, f"{self.where()}: version {report.version} was installed with a changed byte"
            self.refits += 1
            self.failed = 0
            self.pauses.append(report.pause_seconds)
            await offered
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - of whatever kind: tokens show whether it was right to go on
            self.failures[type(error).__name__] += 1
            self.failed += 1
            print(f"version {self.version}: {type(error).__name__}: {error}", flush=True)
        finally:
            self.ledger.refitting = False
            offered.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await offered
        assert not self.ledger.wrong, f"{self.where()}: {self.ledger.wrong}"
        return not self.failed

    async def join(self) -> None:
        """Trainer and engine join the job anew, while no faults are done."""
        striking = self.strikes.on.is_set()
        self.strikes.on.clear()
        await self.strikes.quiet()
        self.trainer.kill()
        await asyncio.gather(self.worker(join, asdict(self.job)), self.trainer.start())
        self.failed, self.strikes.lost_store = 0, False
        self.ledger.counts["joined anew"] += 1
        if striking:
            self.strikes.on.set()

    async def stream(self, number: int) -> None:
        """One request after the other."""
        chance = random.Random(self.case["seed"] * 100 + number)
        prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(8, 120))] for _ in range(PROMPTS)]
        count = 0
        while not self.stopping:
            count += 1
            request = self.request(f"{number}-{count}", chance.choice(prompts), chance.randint(20, 120))
            await asyncio.wait_for(request, REQUEST_SECONDS)
            self.ledger.counts["requests"] += 1

    async def request(self, name: str, prompt: list[int], wanted: int) -> None:
        """Ask until all tokens are there; after an abort for those that are missing."""
        got: list[int] = []
        tries = 0
        while len(got) < wanted:
            tries += 1
            sampling = SamplingParams(temperature=0, max_tokens=wanted - len(got), detokenize=False, ignore_eos=True)
            attempt = self.ledger.begin(wanted - len(got))
            try:
                answers = self.engine.generate({"prompt_token_ids": prompt + got}, sampling, f"{name}-{tries}")
                async for answer in answers:
                    output = answer.outputs[0]
                    self.ledger.get(attempt, list(output.token_ids[len(attempt.tokens) :]))
                    for span in output.weight_versions or ():
                        version = 0 if span.version == "default" else int(span.version)
                        self.ledger.label(attempt, version, span.start, span.end)
            except RefusedError:
                self.ledger.refuse(attempt)
                await asyncio.sleep(0.05)
                continue
            self.ledger.end(attempt, str(output.finish_reason))
            got += attempt.tokens

    def where(self) -> str:
        """For messages."""
        return f"{self.case}, version {self.version}, refit {self.refits}, faults {dict(self.strikes.done)}"


def held(name: str, number: int) -> dict[str, int]:
    """Resident bytes and descriptors of a process."""
    pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
    return {
        f"{name}_rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        f"{name}_descriptors": len(os.listdir(f"/proc/{number}/fd")),
    }


async def main() -> None:
    store = Store()
    try:
        soak = Soak(json.loads(sys.argv[1]), Path(sys.argv[2]), store)
        async with soak.running():
            print("RESULT " + json.dumps(await soak.run()), flush=True)
    finally:
        store.close()


if __name__ == "__main__":
    asyncio.run(main())
