"""The part of `refit_case.py` in which a script of vLLM's own trainer factory sends weights."""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from weft_vllm.trainer import WeftTrainerInitInfo


class Client:
    """vLLM's `VLLMWeightSyncClient`, for an `LLM` in this process."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


def train(case: Any) -> dict[str, Any]:
    """Send model "B" as such scripts do: pause, `send_weights`, forget caches, resume."""
    sender = WeightTransferTrainerFactory.trainer_init(
        WeftTrainerInitInfo(
            case.init["store"], "factory", rank=0, transport=case.init["transport"], deadlines=case.init["deadlines"]
        ),
        client=Client(case.llm),
        source=ModuleSource(case.models["B"].to(case.dtype)),
    )
    case.control.pause("abort")
    sender.send_weights()
    case.control.invalidate_caches(1)
    case.control.resume(1)
    found = {"gaps": case.gaps("B"), "weight_version": case.llm.get_weight_version()}
    sender.shutdown()
    return found
