"""The copies that a holder of versions serves from: one of every version that it keeps, and one for what comes next."""

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
from weft.shadow import available_bytes, beside, shadow_bytes


class Copy:
    """A `weft.contracts.Source` in host memory: one whole version, which does not change while anybody reads it."""

    def __init__(self, copies: Copies, memory: Mapping[str, torch.Tensor]) -> None:
        self.version = -1
        """What it holds; -1 before the first."""
        self.readers = 0
        """How many read it now."""
        self.leaving = False
        """Whether another version is to take its place: new readers wait for that."""
        self._copies, self._memory = copies, memory

    @contextmanager
    def reading(self, version: int) -> Iterator[bool]:
        """Keep the copy as it is, if it is of this version, or find that it is not: only then may one read."""
        changed = self._copies.changed
        with changed:
            there = self.version == version and not self.leaving
            self.readers += there
        try:
            yield there
        finally:
            if there:
                with changed:
                    self.readers -= 1
                    self._copies.take_over()

    def await_version(self, version: int, deadline: Deadline) -> None:
        """Until this copy has a version, or a newer one. Raises `DeadlineError`."""
        changed = self._copies.changed
        with changed:
            if not changed.wait_for(lambda: self.version >= version, deadline.remaining()):
                raise DeadlineError(
                    f"version {version} of the copies", deadline.seconds, self._copies.read_now() or ["nobody reads"]
                )

    def take(self, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Hold another version."""
        for name, copied in self._memory.items():
            copied.copy_(weights[name])
        self.version, self.leaving = version, False

    def layout(self) -> Layout:
        """That of the weights, as it was at first."""
        return self._copies.layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """The copy itself."""
        return self._memory

    def hold(self, version: int) -> HeldVersion:
        """Nothing to do: who reads is inside `reading`."""
        return HeldVersion(version)

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        """Never needed: copies have no produced buffers."""
        raise AssertionError(f"nothing is produced from copies, but group {group.name} was asked for")


class Copies:
    """The newest versions of weights that change, `retain` of them, and the *next* one, which nobody reads.

    `newest`, the first copy, always has the newest version that is served, so that who follows versions stays with one
    copy. When the next one is taken over, what the newest copy had goes to the oldest one, and what that had is given
    up. Nobody reads either meanwhile. Safe to use from several threads.
    """

    def __init__(self, source: Source, retain: int = 1) -> None:
        """Allocates. Raises `ConfigError` for buffers that hold nothing between refits, and when the host has less
        memory than that.
        """
        self.layout = source.layout()
        """That of the source, as it was at first."""
        self.changed = threading.Condition()
        """Held while a copy changes hands."""
        self._source, self._weights = source, source.memory()
        fleeting = sorted(f"{b.name} ({b.kind})" for b in self.layout.buffers if b.kind is not Kind.LIVE)
        if fleeting:
            raise ConfigError(
                f"only weights that stay in memory can be published, and these do not: {', '.join(fleeting)}"
            )
        host = torch.device("cpu")
        needed, available = copies_bytes(self.layout, retain), available_bytes(host)
        if available is not None and needed > available:
            raise ConfigError(
                f"{retain + 1} copies of {shadow_bytes(self.layout)} bytes, for versions to be kept (retain={retain}) "
                f"and the next one, need {needed} bytes of host memory, and {available} are available: retain fewer"
            )
        pinned = any(memory.is_cuda for memory in self._weights.values())
        *kept, self._next = (beside(self.layout, host, pinned=pinned) for _ in range(retain + 1))
        self.copies = tuple(Copy(self, memory) for memory in kept)
        """All that may be read; `newest` is the first."""
        self._coming = -1
        self._turning = False

    @property
    def newest(self) -> Copy:
        """The copy of the newest version that is served."""
        return self.copies[0]

    @property
    def version(self) -> int:
        """The newest version that is served; -1 before the first."""
        return self.newest.version

    @property
    def coming(self) -> int:
        """The version of the next copy; -1 before the first."""
        return self._coming

    def stay(self) -> int:
        """Forget the next copy, which nobody takes over any more; returns the newest version that is served."""
        with self.changed:
            self._turning, self._coming = False, self.version
            for copy in self.copies:
                copy.leaving = False
            return self.version

    def fill(self, version: int) -> None:
        """Copy the weights as they are now into the next copy; what was there is forgotten first, and for good."""
        self.stay()
        lease = self._source.hold(version)
        try:
            for name, copied in self._next.items():
                copied.copy_(self._weights[name])
        finally:
            lease.release()
        with self.changed:
            self._coming = version

    def turn(self) -> None:
        """Serve the next copy as soon as nobody reads what makes room for it; new readers of that wait."""
        with self.changed:
            self._turning = self._coming > self.version
            for copy in self._moving():
                copy.leaving = self._turning
            self.take_over()

    def take_over(self) -> None:
        """Whenever a reader has ended, with `changed` held."""
        moving = self._moving()
        if self._turning and not any(copy.readers for copy in moving):
            for old in moving[1:]:
                old.take(self.version, self.newest.memory())
            self.newest.take(self._coming, self._next)
            self._turning = False
            self.changed.notify_all()

    def read_now(self) -> list[str]:
        """Which copies are read, in words."""
        return [f"{copy.readers} readers of {copy.version}" for copy in self.copies if copy.readers]

    def _moving(self) -> list[Copy]:
        """The newest copy, and the one that gets its version, if it is another."""
        others = self.copies[1:]
        return [self.newest, min(others, key=lambda copy: copy.version)] if others else [self.newest]


def copies_bytes(layout: Layout, retain: int) -> int:
    """Host memory that a holder of `retain` versions allocates: one more copy than it keeps versions."""
    return (retain + 1) * shadow_bytes(layout)
