"""One source in many cells."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weft.contracts import Event, Group, Lease, Source, Stream
from weft.layout import Layout


class SharedSource:
    """One source in many cells: one layout, one memory, and one promise per version that all cells share."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._layout, self._memory = source.layout(), source.memory()
        self._held: tuple[Lease, int] | None = None

    def layout(self) -> Layout:
        """As it was when the fleet opened."""
        return self._layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """As it was when the fleet opened."""
        return self._memory

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        """The source's own."""
        return self._source.produce(group, out, stream)

    def hold(self, version: int) -> Lease:
        """A share of the version's promise, which ends with the last share."""
        if self._held is None or self._held[0].version != version:
            self._held = (self._source.hold(version), 0)
        self._held = (self._held[0], self._held[1] + 1)
        return _Share(self)

    @property
    def lease(self) -> Lease:
        """Of the version at hand."""
        assert self._held is not None, "shares are made by hold"
        return self._held[0]

    def give_back(self, lease: Lease) -> None:
        """End a share."""
        if self._held is not None and self._held[0] is lease:
            self._held = (lease, self._held[1] - 1)
            if not self._held[1]:
                self._held = None
                lease.release()


class _Share:
    def __init__(self, shared: SharedSource) -> None:
        self._shared, self._lease = shared, shared.lease
        self.version = self._lease.version
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._shared.give_back(self._lease)
