"""The demo itself: start both sides, sample, score, learn, refit, and check the end against the reference."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec
from safetensors.torch import load_file

import weft
from weft_cli.demo.checkpoint import config_of, write_checkpoint
from weft_cli.demo.processes import Child, Family, answers, ask
from weft_cli.demo.reference import compare_outputs, reference_model
from weft_cli.demo.report import Progress, Result, Step
from weft_cli.demo.reward import advantages, mean, token_rewards
from weft_cli.demo.settings import CALL_SECONDS, START_SECONDS, Settings
from weft_cli.demo.slices import ByteComparison, compare, expected_parameters

_CHECK_PROMPTS = 16
_SEEDS_PER_VERSION = 10_000


def run(settings: Settings, progress: Progress, *, flip_byte: bool) -> Result:
    """One whole demo. Needs Linux, about 4 GiB of memory, and two cores to be quick; leaves no process behind, however
    it ends.

    Raises `ChildError` when a child dies or is late. A check that fails is in the result, not an exception.
    """
    directory = Path(settings.directory)
    progress.doing("making a checkpoint")
    write_checkpoint(settings)
    store = weft.serve_store(host="127.0.0.1", port=0)
    try:
        with Family(directory) as family:
            engine = family.start("engine", "weft_cli.demo.engine", _engine_environment(settings))
            trainers = [
                family.start(f"trainer/{rank}", "weft_cli.demo.trainer", _trainer_environment())
                for rank in range(settings.trainer_ranks)
            ]
            _start(settings, progress, engine, trainers, store.url)
            family.note_shared_memory()
            result = _Loop(settings, progress, engine, trainers).run(flip_byte=flip_byte)
            progress.doing("ending the engine and the trainer")
            ask(trainers, CALL_SECONDS, "close")
            return result
    finally:
        store.close()


def _start(settings: Settings, progress: Progress, engine: Child, trainers: list[Child], url: str) -> None:
    parallel = "EP" if settings.model.experts else "TP"
    progress.doing(f"starting vLLM (TP {settings.engine_ranks}) and Megatron ({parallel} {settings.trainer_ranks})")
    made = msgspec.to_builtins(settings)
    engine.send("start", settings=made)
    for rank, trainer in enumerate(trainers):
        trainer.send("start", settings=made, rank=rank)
    answers([engine, *trainers], START_SECONDS, "start")
    progress.doing(f"meeting over {settings.transport}")
    engine.send("connect", store=url, transport=settings.transport, sources=len(trainers))
    for trainer in trainers:
        trainer.send("connect", store=url)
    answers([engine, *trainers], CALL_SECONDS, "connect")


class _Loop:
    """Sampling, learning and refitting with children that are up and have met."""

    def __init__(self, settings: Settings, progress: Progress, engine: Child, trainers: list[Child]) -> None:
        self._settings, self._progress = settings, progress
        self._engine, self._trainers = engine, trainers
        self._random = random.Random(settings.seed)
        self._prompts = self._draw_prompts(settings.prompts)

    def run(self, *, flip_byte: bool) -> Result:
        settings, steps = self._settings, []
        # A sampling engine is a function of weights, prompts and seeds: before the first refit it is the one that is
        # never refitted.
        frozen = mean(token_rewards(self._sample(settings.steps)))
        tokens = self._sample(0)
        first = mean(token_rewards(tokens))
        self._progress.first(first)
        counts: Counter[str] = Counter()
        for version in range(1, settings.steps + 1):
            self._progress.doing(f"learning version {version}")
            self._learn(tokens)
            step = self._refit(version, counts)
            tokens = self._sample(version)
            step = msgspec.structs.replace(step, reward=mean(token_rewards(tokens)))
            steps.append(step)
            self._progress.step(step)
        damaged = ask([self._engine], CALL_SECONDS, "flip_byte")[0]["parameter"] if flip_byte else None
        self._progress.doing("checking tokens, log-probabilities and bytes against Hugging Face")
        return self._check(Result.of(settings, first, frozen, steps, counts, damaged))

    def _sample(self, version: int) -> list[list[int]]:
        base = (self._settings.seed * 100 + version) * _SEEDS_PER_VERSION
        seeds = [base + index for index in range(len(self._prompts))]
        answer = ask(
            [self._engine],
            CALL_SECONDS,
            "sample",
            prompts=self._prompts,
            seeds=seeds,
            new_tokens=self._settings.new_tokens,
        )
        tokens: list[list[int]] = answer[0]["tokens"]
        return tokens

    def _learn(self, tokens: list[list[int]]) -> None:
        sequences = [prompt + completion for prompt, completion in zip(self._prompts, tokens, strict=True)]
        ask(self._trainers, CALL_SECONDS, "train", sequences=sequences, advantages=advantages(token_rewards(tokens)))

    def _refit(self, version: int, counts: Counter[str]) -> Step:
        """Move one version; from the second on the refit is warm, and what it registers and allocates is counted."""
        everyone = [self._engine, *self._trainers]
        if version > 1:
            ask(everyone, CALL_SECONDS, "start_counting")
        self._progress.doing(f"refitting version {version}")
        began = time.perf_counter()
        self._engine.send("refit", version=version)
        for trainer in self._trainers:
            trainer.send("offer", version=version)
        engine, *trainers = answers(everyone, CALL_SECONDS, f"refit of version {version}")
        seconds = time.perf_counter() - began
        if version > 1:
            for answer in ask(everyone, CALL_SECONDS, "stop_counting"):
                for count in answer["counts"]:
                    counts.update(count)
        return Step.of(version, seconds, engine, trainers)

    def _check(self, result: Result) -> Result:
        settings, directory = self._settings, self._settings.directory
        prompts = self._draw_prompts(_CHECK_PROMPTS)
        greedy = ask([self._engine], CALL_SECONDS, "greedy", prompts=prompts, new_tokens=settings.new_tokens)[0]
        files = ask([self._engine], CALL_SECONDS, "dump", directory=directory)[0]["files"]
        config_of(settings).save_pretrained(settings.trained)
        ask(self._trainers, CALL_SECONDS, "gather", directory=settings.trained)
        state = load_file(f"{settings.trained}/model.safetensors")
        outputs = compare_outputs(
            reference_model(settings.trained), prompts, greedy["tokens"], greedy["log_probabilities"]
        )
        memory = [
            compare(expected_parameters(state, rank, len(files)), load_file(file), rank)
            for rank, file in enumerate(files)
        ]
        return result.checked(outputs, _together(memory))

    def _draw_prompts(self, count: int) -> list[list[int]]:
        vocabulary, length = self._settings.model.vocabulary, self._settings.prompt_tokens
        return [[self._random.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def _together(parts: list[ByteComparison]) -> ByteComparison:
    return ByteComparison(
        sum(part.compared_bytes for part in parts),
        sum(part.mismatched_bytes for part in parts),
        tuple(name for part in parts for name in part.mismatched_parameters),
    )


def _engine_environment(settings: Settings) -> Mapping[str, str]:
    """vLLM's settings for CPU: 1 GiB of key-value cache, one core per rank, no network, and nothing compiled (a
    compilation takes longer than the demo).
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in settings.engine_cores),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }


def _trainer_environment() -> Mapping[str, str]:
    """One thread per rank; the engine needs the cores as well."""
    return {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def cores() -> list[int]:
    """The cores this process may use."""
    return sorted(os.sched_getaffinity(0))
