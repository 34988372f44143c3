"""Live modules as source and as target of weft."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from weft.contracts import Event, Group, Lease, Stream
from weft.errors import LayoutError
from weft.layout import Layout
from weft.names import NameMap
from weft.streams import Finished
from weft_dtensor.inspection import inspect_module


@dataclass(slots=True)
class HeldVersion:
    """The promise of `hold`. Whoever runs the optimizer keeps it: weft cannot stop a step."""

    version: int
    released: bool = False

    def release(self) -> None:
        """End the promise. Idempotent."""
        self.released = True


class ModuleSource:
    """One rank of a trainer (`weft.contracts.Source`); reads the live tensors of `module` where they are.

    Any module of plain tensors and DTensors: `fully_shard` over one or two mesh dimensions, `parallelize_module`, both,
    or neither. A plain tensor counts as whole on every rank. Make it after sharding, since that moves parameters.

    `names` maps the module's names (without `_orig_mod.` and other prefixes of wrappers) to the checkpoint's. The
    default takes them as they are, and knows the families that Transformers 5 holds with fused experts, by
    `module.config.model_type`. Raises `LayoutError` with every tensor that cannot be described.
    """

    def __init__(self, module: nn.Module, names: NameMap | None = None) -> None:
        self._inspection = inspect_module(module, names, written=False)

    def __repr__(self) -> str:
        return f"ModuleSource({self._inspection.layout!r})"

    def layout(self) -> Layout:
        """What this rank holds: one live buffer per tensor; equal replicas of HSDP have equal layouts."""
        return self._inspection.layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """Dense one-dimensional views of this rank's memory, by buffer name. They alias the module."""
        return self._inspection.memory

    def hold(self, version: int) -> Lease:
        """Put FSDP's sharded parameters back and finish the device's work, then promise that bytes do not change.

        Local, except that it waits for an all-gather that is under way: call it on every rank. Raises `LayoutError`
        that names every module still unsharded, or every tensor that has moved.
        """
        self._inspection.settle()
        return HeldVersion(version)

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        """Nothing: all buffers are live. Raises `LayoutError` when asked for any."""
        if out:
            raise LayoutError([f"{name}: live, not produced" for name in out])
        return Finished()


class ModuleTarget:
    """One rank of a module that receives weights (`weft.contracts.Target`), in place.

    `module` and `names` are as for `ModuleSource`; memory must be dense and not shared by different tensors. `reload`
    is called in `prepare_commit` when the new bytes are in, to refresh what is derived from them. While a version is
    moving, nothing may run the module. `failure` holds the error of the last abort until a version has been committed;
    weights may be mixed for that long, and the owner must not use them.
    """

    def __init__(
        self, module: nn.Module, names: NameMap | None = None, *, reload: Callable[[], object] | None = None
    ) -> None:
        self._inspection = inspect_module(module, names, written=True)
        self._reload = reload
        self.version: int | None = None
        self.failure: BaseException | None = None

    def __repr__(self) -> str:
        return f"ModuleTarget({self._inspection.layout!r}, version={self.version})"

    def layout(self) -> Layout:
        """What this rank wants: every parameter and persistent buffer."""
        return self._inspection.layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """Dense one-dimensional views of this rank's memory, by buffer name. Writing to them changes the module."""
        return self._inspection.memory

    def begin(self, version: int) -> int:
        """As `ModuleSource.hold`, with the same errors. Returns layout epoch 0: a module has only one."""
        self._inspection.settle()
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
