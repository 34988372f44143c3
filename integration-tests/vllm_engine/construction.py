"""Building models that vLLM's CPU build could hold but refuses: their layouts can be recorded, though none runs.

What is refused is a kernel, or an import of something beside the model; no parameter depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from vllm.model_executor.layers.fused_moe import config as expert_config
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.models import registry
from vllm.models import deepseek_v32
from vllm.models.deepseek_v32.nvidia.model import DeepseekV32ForCausalLM
from vllm.platforms.cpu import CpuPlatform


def let_build() -> None:
    """Let this process build vision-language models, experts without a gate, and sparse attention."""
    _without_torchvision()
    _experts_without_gate()
    _sparse_attention()


def _without_torchvision() -> None:
    """Vision-language models want one function of an image processor that needs torchvision, whose builds do not go
    with torch for CPU; and vLLM inspects models in a process that would not know of this.
    """
    name = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
    processing: Any = ModuleType(name)
    processing.smart_resize, processing.Qwen2VLImageProcessor = None, object
    sys.modules[name] = processing
    registry._run_in_subprocess = lambda function: function()


def _experts_without_gate() -> None:
    """The kernel on CPU has none of them (Nemotron-H)."""
    supported: Any = CPUUnquantizedExperts.is_supported_config

    def is_supported_config(cls: Any, config: Any, *more: Any) -> tuple[bool, str | None]:
        return supported(cls, config, *more) if config.is_act_and_mul else (True, None)

    CPUUnquantizedExperts.is_supported_config = staticmethod(is_supported_config)
    platform = expert_config.current_platform
    stand_in = SimpleNamespace(is_xpu=lambda: True)
    expert_config.current_platform = _Either(stand_in, platform)


@contextmanager
def as_on_nvidia(wanted: bool) -> Iterator[None]:
    """Have GLM-5 built, if `wanted`, from the class that vLLM has for GPUs of NVIDIA."""
    generic = deepseek_v32.GlmMoeDsaForCausalLM
    if wanted:
        deepseek_v32.GlmMoeDsaForCausalLM = DeepseekV32ForCausalLM
    registry._try_load_model_cls.cache_clear()
    try:
        yield
    finally:
        deepseek_v32.GlmMoeDsaForCausalLM = generic
        registry._try_load_model_cls.cache_clear()


class _Either:
    """Attributes of the first that has them."""

    def __init__(self, *objects: Any) -> None:
        self._objects = objects

    def __getattr__(self, name: str) -> Any:
        return next(getattr(each, name) for each in self._objects if hasattr(each, name))


def _sparse_attention() -> None:
    """There is no backend for it on CPU (GLM-5): the dense one keeps the same of the weights."""
    choose: Any = CpuPlatform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *more: Any, **named: Any
    ) -> Any:
        return choose(cls, selected_backend, attn_selector_config._replace(use_sparse=False), *more, **named)

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
