"""What the demo says: a line per step while it runs, and the result at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.status import Status

from weft_cli.demo.reference import LOG_PROBABILITY_BOUND, OutputComparison
from weft_cli.demo.settings import Settings
from weft_cli.demo.slices import ByteComparison

_PHASES = ("pause", "gather", "wire", "land")
_HEADER = f"{'version':>7}  {'reward':>6}  {'bytes':>11}  " + "  ".join(f"{phase + ' s':>8}" for phase in _PHASES)


class Step(msgspec.Struct, frozen=True):
    """One refit, and the reward of what the engine then sampled."""

    version: int
    bytes: int
    """Moved, over all ranks of the engine."""
    refit_seconds: float
    """From telling both sides to both having committed."""
    phase_seconds: dict[str, float]
    digest: str
    reward: float = float("nan")

    @classmethod
    def of(cls, version: int, seconds: float, engine: Mapping[str, Any], trainers: Sequence[Mapping[str, Any]]) -> Step:
        """From the reports of both sides. Gathering happens on the trainer; the slowest rank counts."""
        phases = dict(engine["seconds"])
        phases["gather"] = max(trainer["seconds"].get("gather", 0.0) for trainer in trainers)
        digests = {engine["digest"], *(trainer["digest"] for trainer in trainers)}
        if len(digests) != 1:
            raise ValueError(f"version {version}: the sides report different digests: {', '.join(sorted(digests))}")
        return cls(version, engine["bytes"], seconds, phases, engine["digest"])

    @property
    def gigabytes_per_second(self) -> float:
        """While bytes were on the wire."""
        wire_seconds = self.phase_seconds.get("wire", 0.0)
        return self.bytes / wire_seconds / 1e9 if wire_seconds else 0.0

    def line(self) -> str:
        """For people."""
        phases = "  ".join(f"{self.phase_seconds.get(phase, 0.0):8.4f}" for phase in _PHASES)
        rate = f"{self.gigabytes_per_second:6.2f}"
        return f"{self.version:7d}  {self.reward:6.3f}  {self.bytes:11,d}  {phases}  {rate}  {self.digest[:16]}"


class Result(msgspec.Struct, frozen=True):
    """What `--json` writes."""

    model: str
    transport: str
    seed: int
    dtype: str
    trainer_ranks: int
    engine_ranks: int
    versions: list[int]
    reward_first: float
    """Of the checkpoint's own weights."""
    reward_last: float
    """Of the last version."""
    reward_frozen: float
    """Of the checkpoint's weights on the prompts and sampling seeds of the last version: what an engine that is never
    refitted would get.
    """
    rewards: list[float]
    bytes_per_refit: int
    refit_seconds: list[float]
    phase_seconds: list[dict[str, float]]
    digests: list[str]
    warm_registrations: int
    """NIXL registrations of all processes together during every refit but the first."""
    warm_allocations: int
    """Tensors that weft allocated meanwhile, by torch's memory profiler."""
    warm_engine_allocations: int
    """Tensors that vLLM allocated meanwhile, in its own processing of loaded weights."""
    flipped: str | None
    tokens_equal: bool = False
    tokens_compared: int = 0
    tokens_different: int = 0
    ties: int = 0
    max_logprob_difference: float = float("inf")
    logprob_bound: float = LOG_PROBABILITY_BOUND
    compared_bytes: int = 0
    mismatched_bytes: int = 0
    mismatched_parameters: list[str] = []
    failures: list[str] = []
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        settings: Settings,
        first: float,
        frozen: float,
        steps: Sequence[Step],
        counts: Mapping[str, int],
        flipped: str | None,
    ) -> Result:
        """From the finished loop, not yet checked."""
        return cls(
            model=settings.model_name,
            transport=settings.transport,
            seed=settings.seed,
            dtype=settings.dtype,
            trainer_ranks=settings.trainer_ranks,
            engine_ranks=settings.engine_ranks,
            versions=[step.version for step in steps],
            reward_first=first,
            reward_last=steps[-1].reward,
            reward_frozen=frozen,
            rewards=[step.reward for step in steps],
            bytes_per_refit=steps[-1].bytes,
            refit_seconds=[step.refit_seconds for step in steps],
            phase_seconds=[step.phase_seconds for step in steps],
            digests=[step.digest for step in steps],
            warm_registrations=counts.get("warm_registrations", 0),
            warm_allocations=counts.get("warm_allocations", 0),
            warm_engine_allocations=counts.get("warm_engine_allocations", 0),
            flipped=flipped,
        )

    def checked(self, outputs: OutputComparison, memory: ByteComparison) -> Result:
        """With the outcome of the final check, and every failure in words."""
        failures = []
        if outputs.tokens_compared == 0 or memory.compared_bytes == 0:
            failures.append(
                f"{outputs.tokens_compared} tokens and {memory.compared_bytes} bytes were compared: too few"
            )
        if outputs.tokens_different:
            failures.append(f"{outputs.tokens_different} greedy tokens differ from Hugging Face's, ties not counted")
        if not outputs.max_logprob_difference <= LOG_PROBABILITY_BOUND:
            failures.append(f"log-probabilities differ by {outputs.max_logprob_difference:.1e}")
        if memory.mismatched_parameters:
            failures.append(f"{memory.mismatched_bytes} bytes of the engine's parameters are not the reference's")
        if not self.reward_last > self.reward_frozen:
            failures.append(f"reward {self.reward_last:.3f} is not above {self.reward_frozen:.3f}, of no refit at all")
        if self.warm_registrations:
            failures.append(f"warm refits registered memory {self.warm_registrations} times")
        return msgspec.structs.replace(
            self,
            tokens_equal=outputs.tokens_compared > 0 and outputs.tokens_different == 0,
            tokens_compared=outputs.tokens_compared,
            tokens_different=outputs.tokens_different,
            ties=outputs.ties,
            max_logprob_difference=outputs.max_logprob_difference,
            compared_bytes=memory.compared_bytes,
            mismatched_bytes=memory.mismatched_bytes,
            mismatched_parameters=list(memory.mismatched_parameters),
            failures=failures,
        )


class Progress:
    """Lines on a console; between them, on a terminal, what is going on now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = console.status("") if console.is_terminal else None
        if self._status is not None:
            self._status.start()

    def doing(self, what: str) -> None:
        """Something that may take seconds begins."""
        if self._status is not None:
            self._status.update(what)

    def first(self, reward: float) -> None:
        """The header, and the line of the checkpoint's own weights."""
        self._print(f"{_HEADER}  {'GB/s':>6}  digest")
        self._print(f"{0:7d}  {reward:6.3f}  {'checkpoint':>11}")

    def step(self, step: Step) -> None:
        """The line of a finished step."""
        self._print(step.line())

    def result(self, result: Result) -> None:
        """The verdict."""
        right = result.tokens_compared - result.tokens_different
        lines = {
            "tokens": f"{right} of {result.tokens_compared} greedy tokens as Hugging Face's, {result.ties} ties",
            "log-probs": f"differ by at most {result.max_logprob_difference:.1e}, bound {result.logprob_bound:.0e}",
            "bytes": f"{result.compared_bytes:,} compared, {result.mismatched_bytes:,} differ",
            "reward": f"{result.reward_last:.3f}, never refitted {result.reward_frozen:.3f}",
            "warm": f"{result.warm_registrations} registrations, {result.warm_allocations} allocations "
            f"(the engine's own processing: {result.warm_engine_allocations})",
            "time": f"{result.seconds:.1f} s",
        }
        for name, words in lines.items():
            self._print(f"{name:10} {words}")
        for words in (*result.mismatched_parameters, *result.failures):
            self._print(f"FAILED     {words}")
        if not result.failures:
            self._print("all checks passed")

    def close(self) -> None:
        """Take the spinner away. Idempotent."""
        if self._status is not None:
            self._status.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
