"""`weft verify` for Transformers models: load one and compare it with a checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import nn

from weft.compare import Reference, compare
from weft.errors import ConfigError, PluginError
from weft.verification import Request, Verification, verdict
from weft_dtensor.checkpoint import CheckpointSource
from weft_dtensor.inspection import inspect_module

RANK = "module"
"""What the one rank is called in a verification."""


def verify_module(
    module: nn.Module, checkpoint: str, *, casts: tuple[tuple[str, str], ...] = (), ignore: tuple[str, ...] = ()
) -> Verification:
    """Compare a module, whole in this process, with a checkpoint. Reads only.

    Raises `ConfigError` for a checkpoint that cannot be read, `LayoutError` for a module that cannot be described.
    """
    policy = Request(model="", checkpoint=checkpoint, casts=casts, ignore=ignore).policy
    reference = Reference.of(CheckpointSource(checkpoint))
    inspection = inspect_module(module, None, written=False)
    return verdict({RANK: compare(inspection.layout, inspection.memory, reference, policy)}, reference, policy)


def load_and_verify(request: Request, report: Callable[[str], None]) -> Verification:
    """Load `request.model` with Transformers, on CPU, and compare it.

    Raises `ConfigError` for parallel sizes (a model is loaded whole), a dtype that torch does not have and a directory
    that Transformers cannot load, `PluginError` where Transformers is missing.
    """
    if request.parallel:
        raise ConfigError(f"a module is loaded whole, in one process: it has no {', '.join(request.parallel)}")
    dtype = getattr(torch, request.dtype, None) if request.dtype else "auto"
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype {request.dtype!r}: expected one of torch's, such as bfloat16")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise PluginError(
            f"loading a model needs Transformers ({error}): pip install 'weft-dtensor[transformers]'"
        ) from error
    report(f"loading {request.model} with Transformers")
    options = {"dtype": dtype, "local_files_only": True, **request.options}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(request.model, **options)
    except Exception as error:  # of Transformers, safetensors or torch: each has classes of its own for bad files
        raise ConfigError(f"Transformers cannot load {request.model}: {error}") from error
    report(f"comparing with {request.checkpoint}")
    return verify_module(model, request.checkpoint, casts=request.casts, ignore=request.ignore)
