"""weft adapter for vLLM: weight-transfer engine, target and replica control of a live engine.

Importing it needs no vLLM; whatever drives an engine says what to install where it is missing.
"""

from weft_vllm.analytic import VllmAdapter, adapter, vllm_layout
from weft_vllm.replica_control import AsyncVllmControl, VllmControl, async_control, control
from weft_vllm.steps import RefusedError, ReplicaReport

__all__ = [
    "AsyncVllmControl", "RefusedError", "ReplicaReport", "VllmAdapter", "VllmControl", "adapter", "async_control",
    "control", "vllm_layout",
]  # fmt: skip
