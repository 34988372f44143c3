"""Replay: moving the buckets of one version. Two machines that are stepped, never wait, and count what they do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from weft.cast import encoding
from weft.contracts import Group, Prepared, Target, Work
from weft.digest import Digest
from weft.digesters import Digester
from weft.errors import TransportError
from weft.layout import Kind, Layout
from weft.lower import SLOTS, LoweredBucket
from weft.prepare import LocalMoves, Step
from weft.shadow import Shadow
from weft.streams import settle, written
from weft.views import Memory, apply_fills
from weft.wire import Notice, Wire

POSTED_PER_PEER = 4
"""Buckets in flight to one receiver: enough to fill the wire while the next one is gathered."""


@dataclass(slots=True)
class Clock:
    """Seconds per phase; phases do not overlap, so what remains of the total is waiting for the wire."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def digester_of(step: Step, version: int, every: int) -> Digester | None:
    """What computes a bucket's digest in this version: one bucket in `every` has one, another in the next version."""
    return step.digest if (step.bucket.index + version) % every == 0 else None


class Sender:
    """Moves one member's buckets to one replica: a source's, or those that a target passes on."""

    def __init__(
        self,
        wire: Wire,
        prepared: Prepared,
        steps: Sequence[Step],
        scratch_slots: Mapping[str, int],
        version: int,
        clock: Clock,
        digest_every: int,
        may_read: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """`may_read` says whether the bytes of a bucket, by index, are there to be sent."""
        self._may_read, self._digest_every = may_read, digest_every
        self._wire, self._prepared, self._version, self._clock = wire, prepared, version, clock
        self._queues: dict[str, deque[Step]] = {}
        for step in steps:
            self._queues.setdefault(step.bucket.peer, deque()).append(step)
        self._active: dict[str, list[tuple[Step, Work]]] = {peer: [] for peer in self._queues}
        self._scratch_slots = scratch_slots
        self._credit: dict[str, tuple[int, int]] = dict.fromkeys(self._queues, (0, 0))
        self.nbytes = 0

    @property
    def done(self) -> bool:
        """Whether every bucket has left: source bytes may change."""
        return not any(self._queues.values()) and not any(self._active.values())

    @property
    def progress(self) -> tuple[object, ...]:
        """Differs after anything has been posted, has left, or has been made room for."""
        return self.nbytes, *map(len, self._active.values()), *self._credit.values()

    @property
    def held_up(self) -> bool:
        """Whether receivers take their time: there is a bucket for one of them, which may have left already."""
        heads = (queue[0] for queue in self._queues.values() if queue)
        return any(self._active.values()) or any(self._may_read(step.bucket.index) for step in heads)

    @property
    def ignored(self) -> bool:
        """The same, but for those that may be waiting for somebody else, to land what came before."""
        heads = ((peer, queue[0].bucket) for peer, queue in self._queues.items() if queue)
        return any(self._active.values()) or any(
            self._may_read(bucket.index) and self._may_land(peer, bucket) for peer, bucket in heads
        )

    def waiting_for(self) -> list[str]:
        """Receivers that have not taken everything yet."""
        return sorted(peer for peer in self._queues if self._queues[peer] or self._active[peer])

    def reads(self, group: int) -> bool:
        """Whether a bucket of this group, or of one before it, has not left yet. Buckets leave by group."""
        heads = (queue[0] for queue in self._queues.values() if queue)
        active = (step for works in self._active.values() for step, _ in works)
        return any(step.bucket.group <= group for step in (*active, *heads))

    def take_credit(self, peer: str, returned: int, landed: int) -> None:
        """A receiver has given back so many staging slots, and landed so many scratch groups, since the beginning."""
        if peer in self._credit:
            before = self._credit[peer]
            self._credit[peer] = (max(before[0], returned), max(before[1], landed))

    def step(self) -> None:
        """Do what can be done now."""
        self.collect()
        for peer, queue in self._queues.items():
            while queue and len(self._active[peer]) < POSTED_PER_PEER and self._may_go(peer, queue[0]):
                self._post(queue.popleft())

    def collect(self) -> None:
        """Count what has left."""
        for peer, works in self._active.items():
            self._active[peer] = [(step, work) for step, work in works if not work.poll()]

    def _may_go(self, peer: str, step: Step) -> bool:
        bucket = step.bucket
        if not self._may_read(bucket.index):
            return False
        returned, _ = self._credit[peer]
        if bucket.slot is not None:
            mine_busy = any(active.bucket.slot == bucket.slot for active, _ in self._active[peer])
            if mine_busy or returned < bucket.staged - SLOTS + 1:
                return False
        return self._may_land(peer, bucket)

    def _may_land(self, peer: str, bucket: LoweredBucket) -> bool:
        landed = self._credit[peer][1]
        return bucket.scratch is None or landed >= bucket.scratch - self._scratch_slots[peer] + 1

    def _post(self, step: Step) -> None:
        bucket = step.bucket
        with self._clock.phase("gather"):
            for destination, source in step.moves:
                encoding.encode(source, destination)
        note = b""
        digest = digester_of(step, self._version, self._digest_every)
        if digest is not None:
            with self._clock.phase("digest"):
                note = digest().hex().encode()
        note = self._wire.note(bucket.peer, self._version, bucket.index, note)
        self.nbytes += bucket.nbytes
        tag = self._wire.tag(self._version)
        after = written(slot for slot, _ in step.moves)
        work = self._wire.transport.post(self._prepared, bucket.index, tag, note, after)
        self._active[bucket.peer].append((step, work))

    def cancel(self) -> None:
        """Give up: nothing more is posted, and what is in flight is cancelled."""
        for queue in self._queues.values():
            queue.clear()
        for works in self._active.values():
            for _, work in works:
                work.cancel()
            works.clear()


class Receiver:
    """Takes one target's buckets of one version, checks their digests and lands their groups in order."""

    def __init__(
        self, wire: Wire, prepared: Prepared | None, steps: Sequence[Step], local: Mapping[int, LocalMoves],
        target: Target, layout: Layout, memory: Memory, version: int, clock: Clock, sources: Collection[str],
        mates: frozenset[str], *, partial: bool, digest_every: int, shadow: Shadow | None = None,
    ) -> None:  # fmt: skip
        """`memory` is what is served; with a `shadow`, bytes land there until `flip`. `sources` are the members that
        send by themselves, others pass on; `mates` those that do so within the replica. `partial` says that groups for
        which nothing comes keep what they hold (`Policy.only`).
        """
        self._sources, self._mates, self._shadow, self._digest_every = sources, mates, shadow, digest_every
        self._wire, self._prepared, self._version, self._clock = wire, prepared, version, clock
        self._steps = {step.bucket.index: step for step in steps}
        self._local, self._target, self._layout, self._memory = local, target, layout, memory
        self._left = [0] * len(layout.groups)
        for step in steps:
            self._left[step.bucket.group] += 1
        names: list[list[str]] = [[] for _ in layout.groups]
        scratch = set()
        for buffer in layout.buffers:
            names[buffer.group].append(buffer.name)
            if buffer.kind is Kind.SCRATCH:
                scratch.add(buffer.group)
        self._groups = [Group(n, name, tuple(names[n])) for n, name in enumerate(layout.groups)]
        self._scratch = scratch
        moved = {step.bucket.group for step in steps} | local.keys()
        self._kept = set(range(len(layout.groups))) - moved if partial else set()
        self._next = 0
        self._landed_scratch = 0
        self._returned = {step.bucket.peer: 0 for step in steps}
        self._ahead: dict[str, set[int]] = {peer: set() for peer in self._returned}
        self.digest = Digest()
        """Of the counted elements verified so far; zero where only some buckets are digested."""
        self.nbytes = 0

    @property
    def shadow(self) -> bool:
        """Whether bytes land beside the weights that are served."""
        return self._shadow is not None

    @property
    def done(self) -> bool:
        """Whether every group has landed."""
        return self._next == len(self._groups)

    def waiting_for(self) -> list[str]:
        """Senders whose buckets are missing; those that pass on only when all sources' are here: they wait, too."""
        senders = {step.bucket.peer for step in self._steps.values()}
        return sorted(senders.intersection(self._sources) or senders)

    def has(self, buckets: Iterable[int]) -> bool:
        """Whether these buckets have been taken, by index."""
        return self._steps.keys().isdisjoint(buckets)

    def take(self) -> None:
        """Take what has arrived. Raises `TransportError` when a digest differs or a bucket comes twice.

        The loss of a member of the same replica is its leader's to tell, who knows the reason.
        """
        for message in self._wire.arrivals(self._version):
            step = self._steps.pop(message.bucket or 0, None)
            if step is None or step.bucket.peer != message.peer:
                raise TransportError(f"bucket {message.bucket} from {message.peer} came twice or is not of this plan")
            self._take(step, message.note)
        self._wire.check(lambda: {step.bucket.peer for step in self._steps.values()} - self._mates)

    def land(self, read: Callable[[int], bool]) -> None:
        """Land the groups whose bytes are all here, in order, but none that is still `read`: landing may change it."""
        while self._next < len(self._groups) and not self._left[self._next] and not read(self._next):
            self._land(self._next)
            self._next += 1
            if self.done:
                settle({memory.device for memory in self._memory.values()})

    def _take(self, step: Step, note: bytes) -> None:
        bucket = step.bucket
        assert self._prepared is not None, "buckets only arrive at members that have prepared for them"
        self._wire.transport.fence(self._prepared, bucket.index, self._wire.tag(self._version), None)
        digester = digester_of(step, self._version, self._digest_every)
        if digester is not None:
            with self._clock.phase("digest"):
                digest = digester()
            if digest.hex().encode() != note:
                group = self._groups[bucket.group].name
                raise TransportError(
                    f"{bucket.nbytes} bytes from {bucket.peer} for group {group} arrived changed: "
                    f"digest {digest.hex()}, sent {note.decode(errors='replace') or 'without one'}"
                )
            if bucket.counted and self._digest_every == 1:
                self.digest += digest
        with self._clock.phase("land"):
            for destination, source in step.moves:
                destination.copy_(source)
            settle({slot.device for _, slot in step.moves[:1]})  # before the slot is given back
        self.nbytes += bucket.nbytes
        self._left[bucket.group] -= 1
        if bucket.slot is not None:
            self._return_slot(bucket.peer, bucket.staged)

    def _return_slot(self, peer: str, staged: int) -> None:
        """Give a slot back. Buckets may arrive out of turn: a slot counts once those before it have been taken, too."""
        ahead = self._ahead[peer]
        ahead.add(staged)
        while self._returned[peer] in ahead:
            ahead.remove(self._returned[peer])
            self._returned[peer] += 1
        self._give_credit(peer)

    def _land(self, group: int) -> None:
        if group not in self._kept:
            self._install(group)
        if group in self._scratch:
            self._landed_scratch += 1
            for peer in self._returned:
                self._give_credit(peer)

    def _install(self, group: int) -> None:
        with self._clock.phase("land"):
            local = self._local.get(group, LocalMoves((), None))
            for destination, source in local.moves:
                encoding.encode(source, destination)
                self.nbytes += destination.numel() * destination.element_size()
            if local.digest is not None and self._digest_every == 1:
                self.digest += local.digest()
            if self._shadow is None:
                self._finish(group)

    def flip(self) -> None:
        """Take over what has landed in the shadow, group by group. Only once it all has."""
        assert self._shadow is not None, "only what lands beside is taken over"
        with self._clock.phase("install"):
            for group in sorted(set(range(len(self._groups))) - self._kept):
                self._shadow.flip(group)
                self._finish(group)
            settle({memory.device for memory in self._memory.values()})

    def _finish(self, group: int) -> None:
        apply_fills(self._layout, self._memory, group)
        self._target.land(self._groups[group], None).synchronize()

    def _give_credit(self, peer: str) -> None:
        numbers = (self._returned[peer], self._landed_scratch)
        self._wire.tell(peer, self._version, Notice("credit", numbers=numbers))
