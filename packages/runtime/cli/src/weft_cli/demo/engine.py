"""The engine driver: a child process that owns one live vLLM engine and does what the demo tells it."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm import LLM, SamplingParams

import weft_vllm
from weft_cli.demo.channel import Handler, Reply, serve
from weft_cli.demo.settings import JOB, REPLICA, Settings

_LARGEST_BATCH = 64


class Engine:
    """The commands an engine driver answers."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._control: weft_vllm.VllmControl

    def handlers(self) -> dict[str, Handler]:
        """By command name."""
        return {
            "start": self.start,
            "connect": self.connect,
            "sample": self.sample,
            "greedy": self.greedy,
            "refit": self.refit,
            "start_counting": self.start_counting,
            "stop_counting": self.stop_counting,
            "dump": self.dump,
            "flip_byte": self.flip_byte,
        }

    def start(self, settings: dict[str, Any]) -> None:
        """Load the checkpoint into a new engine. One thread per rank, so that trainer and engine can share two
        cores.
        """
        made = msgspec.convert(settings, Settings)
        self._llm = LLM(
            made.checkpoint,
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype=made.dtype,
            tensor_parallel_size=made.engine_ranks,
            max_model_len=made.model.positions,
            max_num_seqs=_LARGEST_BATCH,
            seed=made.seed,
            weight_transfer_config={"backend": "weft"},
            worker_extension_cls="weft_cli.demo.worker.DemoWorker",
        )
        self._llm.collective_rpc("demo_observe")
        self._control = weft_vllm.control(self._llm)

    def connect(self, store: str, transport: str, sources: int) -> None:
        """Meet the trainer's ranks."""
        self._llm.init_weight_transfer_engine(
            {
                "init_info": {
                    "store": store,
                    "job": JOB,
                    "transport": transport,
                    "replica": REPLICA,
                    "sources": sources,
                    "replicas": 1,
                }
            }
        )

    def sample(self, prompts: list[list[int]], seeds: list[int], new_tokens: int) -> Reply:
        """Completions at temperature 1, one per prompt, each with its own seed."""
        parameters = [
            SamplingParams(temperature=1.0, max_tokens=new_tokens, seed=seed, detokenize=False, ignore_eos=True)
            for seed in seeds
        ]
        return {"tokens": [list(output.outputs[0].token_ids) for output in self._generate(prompts, parameters)]}

    def greedy(self, prompts: list[list[int]], new_tokens: int) -> Reply:
        """Greedy completions with the log-probability of every token."""
        parameters = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, logprobs=1, detokenize=False, ignore_eos=True
        )
        completions = [output.outputs[0] for output in self._generate(prompts, [parameters] * len(prompts))]
        return {
            "tokens": [list(completion.token_ids) for completion in completions],
            "log_probabilities": [
                [
                    position[token].logprob
                    for token, position in zip(completion.token_ids, completion.logprobs, strict=True)
                ]
                for completion in completions
            ],
        }

    def refit(self, version: int) -> Reply:
        """Install a version."""
        report = self._control.refit(version)
        return {
            "digest": report.digest,
            "bytes": report.nbytes,
            "seconds": {**report.seconds, "pause": report.pause_seconds},
        }

    def start_counting(self) -> None:
        """Every worker counts registrations and allocations from here."""
        self._llm.collective_rpc("demo_start_counting")

    def stop_counting(self) -> Reply:
        """What each worker counted."""
        return {"counts": self._llm.collective_rpc("demo_stop_counting")}

    def dump(self, directory: str) -> Reply:
        """Write every worker's parameters; returns the files in rank order."""
        return {"files": self._llm.collective_rpc("demo_dump", args=(directory,))}

    def flip_byte(self) -> Reply:
        """Damage one byte of one parameter."""
        return {"parameter": "".join(self._llm.collective_rpc("demo_flip_byte"))}

    def _generate(self, prompts: list[list[int]], parameters: list[SamplingParams]) -> list[Any]:
        outputs: list[Any] = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )
        return outputs


if __name__ == "__main__":
    serve(Engine().handlers())
