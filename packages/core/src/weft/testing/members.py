"""Sources and targets over plain memory: real members of a refit, without an engine or a trainer behind them.

They do what their layouts say and nothing else, tell a log what happens to them, and fail or wait where a test asks
for it. Third parties test transports, stores and protocols with them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from weft.contracts import Group, Stream
from weft.deadline import Deadline
from weft.layout import ITEM_BYTES, Kind, Layout
from weft.streams import Finished
from weft.views import Memory, box_view, piece_view, torch_dtype

POISON = 0xFF
"""What every byte of fresh memory holds: NaN in every floating dtype."""
_ALIGNMENT = 64

Hook = Callable[[str, object], None]
"""Called before a member does something, with the method's name and its version or group; may wait or raise."""


class Log:
    """What happened, in one order over all members of a process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[tuple[str, str, object]] = []

    def add(self, member: str, what: str, argument: object) -> None:
        """Note an event."""
        with self._lock:
            self._entries.append((member, what, argument))

    def entries(self, *kinds: str) -> list[tuple[str, str, object]]:
        """(member, what, argument) of these kinds, or of all, in order."""
        with self._lock:
            return [entry for entry in self._entries if not kinds or entry[1] in kinds]


def allocate(layout: Layout) -> dict[str, torch.Tensor]:
    """Poisoned CPU memory for every buffer: one allocation, in which scratch groups share slots as the layout says."""
    place: dict[str, int] = {}
    live = 0
    for buffer in layout.buffers:
        if buffer.kind is not Kind.SCRATCH:
            place[buffer.name] = live
            live += _aligned(buffer.numel * ITEM_BYTES[buffer.dtype])
    groups = sorted({buffer.group for buffer in layout.buffers if buffer.kind is Kind.SCRATCH})
    within = dict.fromkeys(groups, 0)
    for buffer in layout.buffers:
        if buffer.kind is Kind.SCRATCH:
            place[buffer.name] = within[buffer.group]
            within[buffer.group] += _aligned(buffer.numel * ITEM_BYTES[buffer.dtype])
    slot = max(within.values(), default=0)
    for buffer in layout.buffers:
        if buffer.kind is Kind.SCRATCH:
            place[buffer.name] += live + groups.index(buffer.group) % layout.scratch_slots * slot
    arena = torch.full((live + layout.scratch_slots * slot,), POISON, dtype=torch.uint8)
    return {
        b.name: arena[place[b.name] : place[b.name] + b.numel * ITEM_BYTES[b.dtype]].view(torch_dtype(b.dtype))
        for b in layout.buffers
    }


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def poison(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrite every byte."""
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(POISON)


def write(layout: Layout, memory: Memory, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put logical tensors (whole, in the layout's dtypes) where the layout's pieces say."""
    for piece in layout:
        piece_view(piece, memory).copy_(box_view(piece.box, tensors[piece.tensor].contiguous()))


class MemoryLease:
    """A promise that `MemorySource.load` holds the caller to."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.held = True

    def release(self) -> None:
        """End the promise."""
        self.held = False


class _Member:
    def __init__(self, name: str, layout: Layout, log: Log | None, before: Hook | None) -> None:
        self.name = name
        self._layout, self._log, self._before = layout, log or Log(), before
        self._memory = allocate(layout)

    def layout(self) -> Layout:
        """The layout it was made with."""
        return self._layout

    def memory(self) -> dict[str, torch.Tensor]:
        """Its own memory, by buffer."""
        return self._memory

    def _enter(self, what: str, argument: object) -> None:
        """Let the hook have its way, then note that it has happened."""
        if self._before is not None:
            self._before(what, argument)
        self._log.add(self.name, what, argument)


class MemorySource(_Member):
    """`weft.contracts.Source` over one allocation."""

    def __init__(self, name: str, layout: Layout, *, log: Log | None = None, before: Hook | None = None) -> None:
        super().__init__(name, layout, log, before)
        self.leases: list[MemoryLease] = []
        """Every lease so far."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Change the weights to these logical tensors, as an optimizer step would. Never while a lease is held."""
        assert not any(lease.held for lease in self.leases), f"{self.name}: the weights change under a lease"
        write(self._layout, self._memory, tensors)

    def hold(self, version: int) -> MemoryLease:
        """Nothing to gather; `load` refuses until the lease is released."""
        self._enter("hold", version)
        self.leases.append(MemoryLease(version))
        return self.leases[-1]

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Finished:
        """Never needed: memory has no produced buffers."""
        raise AssertionError(f"{self.name}: nothing is produced, but group {group.name} was asked for")


class MemoryTarget(_Member):
    """`weft.contracts.Target` over one allocation. Landing a scratch group keeps a copy and poisons the scratch."""

    def __init__(self, name: str, layout: Layout, *, log: Log | None = None, before: Hook | None = None) -> None:
        super().__init__(name, layout, log, before)
        self._scratch = {buffer.name for buffer in layout.buffers if buffer.kind is Kind.SCRATCH}
        self._kept: dict[str, torch.Tensor] = {}
        self.version = -1
        """The version that was committed last."""
        self.refused = ""
        """Why it must not be served, after an abort."""

    def contents(self) -> dict[str, torch.Tensor]:
        """What every buffer holds; of scratch buffers, what they held when their group landed."""
        return {name: self._kept.get(name, memory) for name, memory in self._memory.items()}

    def poison(self) -> None:
        """Overwrite everything, kept copies of scratch included."""
        poison([*self._memory.values(), *self._kept.values()])

    def begin(self, version: int) -> int:
        """Always layout epoch 0."""
        self._enter("begin", version)
        return 0

    def land(self, group: Group, stream: Stream) -> Finished:
        """Keep what arrived in scratch, as an engine's post-processing would, and spoil the scratch."""
        self._enter("land", group.name)
        for name in self._scratch.intersection(group.buffers):
            self._kept.setdefault(name, torch.empty_like(self._memory[name])).copy_(self._memory[name])
            poison([self._memory[name]])
        return Finished()

    def prepare_commit(self, version: int) -> None:
        """Nothing to prepare."""
        self._enter("prepare_commit", version)

    def commit(self, version: int) -> None:
        """The version is whole."""
        self._enter("commit", version)
        self.version, self.refused = version, ""

    def abort(self, version: int, error: BaseException) -> None:
        """The memory may hold a mixture: refuse."""
        self.refused = f"{type(error).__name__}: {error}"
        self._enter("abort", version)


class MemoryControl:
    """`weft.contracts.ReplicaControl` of a replica that serves nobody: it knows what it would serve."""

    def __init__(self, name: str, *, log: Log | None = None, before: Hook | None = None) -> None:
        self.name = name
        self._log, self._before = log or Log(), before
        self.served: int | None = -1
        """The version that is served; None while paused, and -1 before the first."""
        self.refused = ""
        """Why none is served."""

    def pause(self, mode: str, deadline: Deadline) -> None:
        """Serve nothing."""
        self._enter("pause", mode)
        self.served = None

    def invalidate_caches(self, version: int) -> None:
        """There are none."""
        self._enter("invalidate_caches", version)

    def resume(self, version: int) -> None:
        """Serve a version."""
        self._enter("resume", version)
        self.served, self.refused = version, ""

    def refuse(self, reason: str) -> None:
        """Serve nothing, and say why."""
        self._enter("refuse", reason)
        self.served, self.refused = None, reason

    def _enter(self, what: str, argument: object) -> None:
        if self._before is not None:
            self._before(what, argument)
        self._log.add(self.name, what, argument)
