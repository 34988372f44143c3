"""Live modules as source and as target of weft."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from weft.live import LiveSource, LiveTarget
from weft.names import NameMap
from weft_dtensor.inspection import inspect_module


class ModuleSource(LiveSource):
    """One rank of a trainer (`weft.contracts.Source`); reads the live tensors of `module` where they are.

    Any module of plain tensors and DTensors: `fully_shard` over one or two mesh dimensions, `parallelize_module`, both,
    or neither; or one under `FullyShardedDataParallel`. A plain tensor counts as whole on every rank. Make it after
    sharding, since that moves parameters.

    `names` maps the module's names (without `_orig_mod.` and other prefixes of wrappers) to the checkpoint's. The
    default takes them as they are, and knows the families that Transformers 5 holds with fused experts, by
    `module.config.model_type`. Raises `LayoutError` with every tensor that cannot be described.

    `hold` puts FSDP's sharded parameters back and finishes the device's work. It is local, except that it waits for an
    all-gather that is under way: call it on every rank. It raises `LayoutError` that names every module still
    unsharded, or every tensor that has moved.
    """

    framework = ("torch", str(torch.__version__))

    def __init__(self, module: nn.Module, names: NameMap | None = None) -> None:
        found = inspect_module(module, names, written=False)
        super().__init__(found.layout, found.memory, found.settle)


class ModuleTarget(LiveTarget):
    """One rank of a module that receives weights (`weft.contracts.Target`), in place.

    `module` and `names` are as for `ModuleSource`, and `begin` does what `ModuleSource.hold` does; memory must be dense
    and not shared by different tensors. `reload` is called in `prepare_commit` when the new bytes are in, to refresh
    what is derived from them. While a version is moving, nothing may run the module.
    """

    framework = ("torch", str(torch.__version__))

    def __init__(
        self, module: nn.Module, names: NameMap | None = None, *, reload: Callable[[], object] | None = None
    ) -> None:
        found = inspect_module(module, names, written=True)
        super().__init__(found.layout, found.memory, found.settle, reload)
