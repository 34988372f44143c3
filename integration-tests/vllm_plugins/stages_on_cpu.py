"""A vLLM plug-in for tests: pipeline stages on CPU. Put this folder on `PYTHONPATH` of whatever starts an engine.

In vLLM 0.31 and 0.32 a stage that is not the first makes the tensors that it receives into in a profiling run, which
the CPU worker leaves out: with `pipeline_parallel_size=2` the engine starts, and ends at its first request with an
AssertionError. Here they are made when they are first needed.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def register() -> None:
    """Entry point of group `vllm.general_plugins`: called in every process, in some of them more than once."""
    original = GPUModelRunner.sync_and_gather_intermediate_tensors
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def receive(self: Any, *given: Any, **named: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, *given, **named)

    GPUModelRunner.sync_and_gather_intermediate_tensors = receive
