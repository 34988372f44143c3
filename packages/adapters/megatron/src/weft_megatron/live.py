"""Live Megatron-Core models as source and as target of weft."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weft.live import LiveSource, LiveTarget
from weft.streams import settle
from weft_megatron.inspection import HasToDict, Inspection, inspect_model
from weft_megatron.upstream import FRAMEWORK, finish_parameter_gathers, global_rank


class MegatronSource(LiveSource):
    """One rank of a Megatron trainer (`weft.contracts.Source`); reads the live parameters where they are.

    `model` is what the trainer has: a `GPTModel` or `MambaModel`, a list of virtual pipeline chunks, either of them in
    `Float16Module` and `DistributedDataParallel`. Make it after wrapping, since wrappers move parameters. `hf_config`
    is the Hugging Face config of the same model, as a mapping or a transformers config. Raises what `inspect_model`
    raises.

    `hold` finishes pending parameter gathers and the device's work. It is collective over the data-parallel group when
    DDP overlaps its parameter gather (`overlap_param_gather` with the distributed optimizer), else local. It raises
    `LayoutError` when parameters have moved.
    """

    framework = FRAMEWORK

    def __init__(self, model: Any, hf_config: Mapping[str, Any] | HasToDict) -> None:
        found = inspect_model(model, hf_config)
        super().__init__(found.layout, found.memory, lambda: _settle(found))


class MegatronTarget(LiveTarget):
    """One rank of a Megatron model that receives weights (`weft.contracts.Target`), in place.

    `model` and `hf_config` are as for `MegatronSource`, and `begin` does what `MegatronSource.hold` does. `reload` is
    called in `prepare_commit` when the new bytes are in: pass `optimizer.reload_model_params` where an optimizer keeps
    fp32 copies, or its next step writes the old weights back. While a version is moving, nothing may run the model. Its
    layout has both copies of a tied embedding under pipeline parallelism.
    """

    framework = FRAMEWORK

    def __init__(
        self,
        model: Any,
        hf_config: Mapping[str, Any] | HasToDict,
        *,
        reload: Callable[[], object] | None = None,
    ) -> None:
        found = inspect_model(model, hf_config)
        super().__init__(found.layout, found.memory, lambda: _settle(found), reload)


def member_name(role: str = "trainer") -> str:
    """`role/rank`, with this process's global rank: the name under which it takes part. Needs Megatron's groups."""
    return f"{role}/{global_rank()}"


def _settle(inspection: Inspection) -> None:
    finish_parameter_gathers(inspection.chunks)
    inspection.check_addresses()
    settle({tensor.device for tensor in inspection.memory.values()})
