"""`weft verify` inside a vLLM worker: its own memory against a checkpoint, where that memory is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from weft.compare import compare
from weft.policy import Policy
from weft_vllm.compat import VllmConfig
from weft_vllm.parameters import LOADER
from weft_vllm.target import VllmTarget
from weft_vllm.verification import reference

_COMPUTED = "goes through the engine's own loader, which computes with it: {}"


def verify_worker(
    model: torch.nn.Module, config: VllmConfig, path: str, casts: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Compare this rank's model with the checkpoint at `path`; the answer is plain values, errors among them, because
    vLLM loses the errors of all workers but the first.

    Describes the model anew, so it works with or without a refit job, and only reads.
    """
    try:
        target = VllmTarget.from_worker(model, config, scratch_slots=1)
        reasons = "; ".join(dict.fromkeys(target.recorded.derived.values()))
        buffers = target.layout().buffers
        unread = {each.name: _COMPUTED.format(reasons) for each in buffers if each.name.startswith(LOADER)}
        policy = Policy(casts=tuple((source, to) for source, to in casts))
        found = compare(target.layout(), target.memory(), reference(path), policy, unread)
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer carries it
        return {"error": f"{type(error).__name__}: {error}"}
    return {"comparison": msgspec.to_builtins(found)}
