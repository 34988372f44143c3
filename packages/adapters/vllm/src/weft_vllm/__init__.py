"""weft adapter for vLLM: weight-transfer engine, target and replica control of a live engine.

Importing it needs no vLLM; whatever drives an engine says what to install where it is missing.
"""

from weft_vllm.analytic import VllmAdapter, adapter, vllm_layout
from weft_vllm.http_control import HttpControl
from weft_vllm.replica_control import AsyncVllmControl, VllmControl, async_control, control
from weft_vllm.server import ServerError
from weft_vllm.steps import RefusedError, ReplicaReport

__all__ = [
    "AsyncVllmControl", "HttpControl", "RefusedError", "ReplicaReport", "ServerError", "VllmAdapter", "VllmControl",
    "adapter", "async_control", "control", "vllm_layout",
]  # fmt: skip
