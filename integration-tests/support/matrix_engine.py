"""A process that owns one live vLLM engine, and refits it when told to.

Run as `python -m support.matrix_engine` by `weft_cli.demo.processes`.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm import LLM, SamplingParams

import weft_vllm
from weft_cli.demo.channel import Handler, Reply, serve


class Engine:
    """The commands that an engine answers."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._control: weft_vllm.VllmControl

    def handlers(self) -> dict[str, Handler]:
        """By command name."""
        return {name: getattr(self, name) for name in ("start", "open", "receive", "greedy")}

    def start(self, checkpoint: str, tp: int, ep: bool, dtype: str) -> None:
        """Load a checkpoint into a new engine."""
        self._llm = LLM(
            checkpoint,
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype=dtype,
            tensor_parallel_size=tp,
            enable_expert_parallel=ep,
            max_model_len=64,
            max_num_seqs=16,
            weight_transfer_config={"backend": "weft"},
        )
        self._control = weft_vllm.control(self._llm)

    def open(self, **init_info: Any) -> None:
        """Take part in a job, after leaving the former one. Collective over the job."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def receive(self, version: int) -> Reply:
        """Install a version; every worker's report."""
        return {"workers": msgspec.to_builtins(self._control.refit(version).workers)}

    def greedy(self, prompts: list[list[int]], new_tokens: int) -> Reply:
        """Greedy completions."""
        parameters = SamplingParams(temperature=0.0, max_tokens=new_tokens, detokenize=False, ignore_eos=True)
        answers = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        return {"tokens": [list(answer.outputs[0].token_ids) for answer in answers]}


if __name__ == "__main__":
    serve(Engine().handlers())
