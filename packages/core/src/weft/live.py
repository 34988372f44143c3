"""What sources and targets of live weights share: every buffer is memory of the framework itself, and stays there.

An adapter finds the layout and the memory, and says how to settle: finish what still writes weights, and check that
they have not moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from weft.contracts import Event, Group, Lease, Stream
from weft.errors import LayoutError
from weft.layout import Layout
from weft.streams import Finished


@dataclass(slots=True)
class HeldVersion:
    """The promise of `hold`. Whoever runs the optimizer keeps it: weft cannot stop a step."""

    version: int
    released: bool = False

    def release(self) -> None:
        """End the promise. Idempotent."""
        self.released = True


class _Live:
    """One rank's weights where they are."""

    def __init__(self, layout: Layout, memory: Mapping[str, torch.Tensor], settle: Callable[[], None]) -> None:
        self._layout, self._memory, self._settle = layout, memory, settle

    def layout(self) -> Layout:
        """One live buffer per parameter and persistent buffer; equal ranks have equal layouts."""
        return self._layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """Dense one-dimensional views of this rank's memory, by buffer name. They alias the weights."""
        return self._memory


class LiveSource(_Live):
    """One rank that has weights (`weft.contracts.Source`), read where they are.

    `memory` holds a dense one-dimensional tensor per buffer of `layout`. `settle` is called by `hold`; what it raises
    goes to the caller.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._layout!r})"

    def hold(self, version: int) -> Lease:
        """Settle, then promise that bytes do not change until release. Collective where settling is."""
        self._settle()
        return HeldVersion(version)

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        """Nothing: all buffers are live. Raises `LayoutError` when asked for any."""
        if out:
            raise LayoutError([f"{name}: live, not produced" for name in out])
        return Finished()


class LiveTarget(_Live):
    """One rank that receives weights (`weft.contracts.Target`), in place.

    `layout`, `memory` and `settle` are as for `LiveSource`. `reload` is called in `prepare_commit` when the new bytes
    are in, to refresh what is derived from them. While a version is moving, nothing may run the model. `failure` holds
    the error of the last abort until a version has been committed; weights may be mixed for that long, and the owner
    must not use them.
    """

    def __init__(
        self,
        layout: Layout,
        memory: Mapping[str, torch.Tensor],
        settle: Callable[[], None],
        reload: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(layout, memory, settle)
        self._reload = reload
        self.version: int | None = None
        self.failure: BaseException | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._layout!r}, version={self.version})"

    def begin(self, version: int) -> int:
        """Settle, collectively where that is. Returns layout epoch 0: live weights have only one."""
        self._settle()
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
