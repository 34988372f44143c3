"""Live Megatron-Core models as source and as target of weft."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weft.contracts import Event, Group, Lease, Stream
from weft.errors import LayoutError
from weft.layout import Layout
from weft.streams import Finished
from weft_megatron.inspection import HasToDict, Inspection, inspect_model
from weft_megatron.upstream import finish_parameter_gathers, global_rank


@dataclass(slots=True)
class HeldVersion:
    """The promise of `MegatronSource.hold`. Whoever runs the optimizer keeps it: weft cannot stop a step."""

    version: int
    released: bool = False

    def release(self) -> None:
        """End the promise. Idempotent."""
        self.released = True


class MegatronSource:
    """One rank of a Megatron trainer (`weft.contracts.Source`); reads the live parameters where they are.

    `model` is what the trainer has: a `GPTModel`, a list of virtual pipeline chunks, either of them in `Float16Module`
    and `DistributedDataParallel`. Make it after wrapping, since wrappers move parameters. `hf_config` is the Hugging
    Face config of the same model, as a mapping or a transformers config. Raises what `inspect_model` raises.
    """

    def __init__(self, model: Any, hf_config: Mapping[str, Any] | HasToDict) -> None:
        self._inspection = inspect_model(model, hf_config)

    def __repr__(self) -> str:
        return f"MegatronSource({self._inspection.layout!r})"

    def layout(self) -> Layout:
        """What this rank holds: one live buffer per parameter."""
        return self._inspection.layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """Flat views of the live parameters, by buffer name. They alias the model."""
        return self._inspection.memory

    def hold(self, version: int) -> Lease:
        """Finish pending parameter gathers and the device's work, then promise that bytes do not change until release.

        Collective over the data-parallel group when DDP overlaps its parameter gather (`overlap_param_gather` with the
        distributed optimizer), else local. Raises `LayoutError` when parameters have moved.
        """
        finish_parameter_gathers(self._inspection.chunks)
        _settle(self._inspection)
        return HeldVersion(version)

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        """Nothing: all buffers are live. Raises `LayoutError` when asked for any."""
        if out:
            raise LayoutError([f"{name}: live, not produced" for name in out])
        return Finished()


class MegatronTarget:
    """One rank of a Megatron model that receives weights (`weft.contracts.Target`), in place.

    `model` and `hf_config` are as for `MegatronSource`. `reload` is called in `prepare_commit` when the new bytes are
    in: pass `optimizer.reload_model_params` where an optimizer keeps fp32 copies, or its next step writes the old
    weights back. While a version is moving, nothing may run the model. `failure` holds the error of the last abort
    until a version has been committed; weights may be mixed for that long, and the owner must not use them.
    """

    def __init__(
        self,
        model: Any,
        hf_config: Mapping[str, Any] | HasToDict,
        *,
        reload: Callable[[], object] | None = None,
    ) -> None:
        self._inspection = inspect_model(model, hf_config)
        self._reload = reload
        self.version: int | None = None
        self.failure: BaseException | None = None

    def __repr__(self) -> str:
        return f"MegatronTarget({self._inspection.layout!r}, version={self.version})"

    def layout(self) -> Layout:
        """What this rank wants: every parameter; both copies of a tied embedding under pipeline parallelism."""
        return self._inspection.layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """Flat views of the live parameters, by buffer name. Writing to them changes the model."""
        return self._inspection.memory

    def begin(self, version: int) -> int:
        """Finish pending gathers and the device's work on the old weights; collective where `MegatronSource.hold` is.

        Returns layout epoch 0: a dense model has only one. Raises `LayoutError` when parameters have moved.
        """
        finish_parameter_gathers(self._inspection.chunks)
        _settle(self._inspection)
        return 0

    def land(self, group: Group, stream: Stream) -> Event:
        """Nothing: bytes arrive where they are used."""
        return Finished()

    def prepare_commit(self, version: int) -> None:
        """Refresh what is derived from the weights, by calling `reload`."""
        if self._reload is not None:
            self._reload()

    def commit(self, version: int) -> None:
        """Note the version; the bytes are in place already."""
        self.version, self.failure = version, None

    def abort(self, version: int, error: BaseException) -> None:
        """Note the error: weights may be mixed until a whole version is in."""
        self.version, self.failure = None, error


def member_name(role: str = "trainer") -> str:
    """`role/rank`, with this process's global rank: the name under which it takes part. Needs Megatron's groups."""
    return f"{role}/{global_rank()}"


def _settle(inspection: Inspection) -> None:
    inspection.check_addresses()
    for device in {tensor.device for tensor in inspection.memory.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
