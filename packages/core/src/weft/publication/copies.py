"""The copies that a holder of versions serves from: one that is read, and one for what comes next."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from weft.contracts import Event, Group, Source, Stream
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError
from weft.layout import Kind, Layout
from weft.live import HeldVersion
from weft.shadow import beside


class Copies:
    """A `weft.contracts.Source` that serves from copies in host memory, while the weights they were made from change.

    The *served* copy is the one that transports read: a whole version, which does not change while anybody reads it.
    The *next* copy takes what is published meanwhile; it is copied over the served one once nobody reads. Safe to use
    from several threads.
    """

    def __init__(self, source: Source) -> None:
        """Allocates twice the source's bytes. Raises `ConfigError` for buffers that hold nothing between refits."""
        self._source, self._layout, self._weights = source, source.layout(), source.memory()
        fleeting = sorted(f"{b.name} ({b.kind})" for b in self._layout.buffers if b.kind is not Kind.LIVE)
        if fleeting:
            raise ConfigError(
                f"only weights that stay in memory can be published, and these do not: {', '.join(fleeting)}"
            )
        pinned = any(memory.is_cuda for memory in self._weights.values())
        self._served, self._next = (beside(self._layout, torch.device("cpu"), pinned=pinned) for _ in range(2))
        self._changed = threading.Condition()
        self._version = self._coming = -1
        self._turning = False
        self._readers = 0

    @property
    def version(self) -> int:
        """The version that is served; -1 before the first."""
        return self._version

    @property
    def coming(self) -> int:
        """The version of the next copy; -1 before the first."""
        return self._coming

    @property
    def readers(self) -> int:
        """How many read the served copy now."""
        return self._readers

    def stay(self) -> int:
        """Forget the next copy, which nobody takes over any more; returns the version that is served."""
        with self._changed:
            self._turning, self._coming = False, self._version
            return self._version

    def fill(self, version: int) -> None:
        """Copy the weights as they are now into the next copy; what was there is forgotten first, and for good."""
        self.stay()
        lease = self._source.hold(version)
        try:
            for name, copied in self._next.items():
                copied.copy_(self._weights[name])
        finally:
            lease.release()
        with self._changed:
            self._coming = version

    def turn(self) -> None:
        """Serve the next copy as soon as nobody reads; new readers wait for it."""
        with self._changed:
            self._turning = self._coming > self._version
            self._take_over()

    @contextmanager
    def reading(self, version: int) -> Iterator[bool]:
        """Keep the served copy as it is, if it is of this version, or find that it is not: only then may one read."""
        with self._changed:
            there = self._version == version and not self._turning
            self._readers += there
        try:
            yield there
        finally:
            if there:
                with self._changed:
                    self._readers -= 1
                    self._take_over()

    def await_version(self, version: int, deadline: Deadline) -> None:
        """Until a version, or a newer one, is served. Raises `DeadlineError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._version >= version, max(0.0, deadline.remaining())):
                raise DeadlineError(
                    f"version {version} of the copies",
                    deadline.seconds,
                    [f"{self._readers} readers of {self._version}"],
                )

    def _take_over(self) -> None:
        if self._turning and not self._readers:
            for name, served in self._served.items():
                served.copy_(self._next[name])
            self._version, self._turning = self._coming, False
            self._changed.notify_all()

    def layout(self) -> Layout:
        """The source's, as it was at first."""
        return self._layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """The served copy."""
        return self._served

    def hold(self, version: int) -> HeldVersion:
        """Nothing to do: who reads is inside `reading`."""
        return HeldVersion(version)

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        """Never needed: copies have no produced buffers."""
        raise AssertionError(f"nothing is produced from copies, but group {group.name} was asked for")
