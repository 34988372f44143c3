"""Prepared programs as NIXL transfer handles, and the queue that keeps a bounded number of them in flight."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from weft.contracts import Bucket, Event, TransferProgram
from weft.deadline import Deadline
from weft.errors import DeadlineError, TransportError
from weft_nixl.library import FOREIGN, translated

_LOG = logging.getLogger(__name__)

MEMORY = {"cpu": "DRAM", "cuda": "VRAM"}
"""NIXL's name for the memory of a device type."""


@dataclass(slots=True, eq=False)
class Chunk:
    """One transfer of a bucket; its handle is made once and posted again for every version."""

    local: Any
    remote: Any
    """Prepared descriptor lists."""
    rows: Any
    """Indices into both, int32."""
    handle: Any = None

    def make(self, agent: Any, peer: str) -> None:
        """Make the handle, unless it is there."""
        if self.handle is None:
            with translated(f"making a transfer of {len(self.rows)} segments", peer):
                self.handle = agent.make_prepped_xfer("WRITE", self.local, self.rows, self.remote, self.rows)

    def drop(self) -> None:
        """Release the handle; NIXL aborts it if it is active."""
        handle, self.handle = self.handle, None
        release(handle)


def release(handle: Any) -> None:
    """Release a handle of any kind. A peer that is gone may make NIXL complain: there is nothing left to lose then."""
    if handle is not None:
        try:
            handle.release()
        except FOREIGN as error:
            _LOG.warning("releasing a NIXL handle: %s", error)


@dataclass(slots=True, eq=False)
class PreparedBucket:
    """One send."""

    bucket: Bucket
    chunks: list[Chunk]
    what: str
    """For errors; made once, since adding up its bytes takes time."""
    active: bool = False


@dataclass(slots=True, eq=False)
class NixlPrepared:
    """A program with its descriptor lists and handles; `peers` are the agents that they were made for."""

    program: TransferProgram
    sends: dict[int, PreparedBucket]
    lists: dict[str, list[Any]]
    """Descriptor lists by peer."""

    def drop(self, peer: str) -> None:
        """Release everything that refers to one peer; its buckets cannot be posted any more."""
        for index in [index for index, send in self.sends.items() if send.bucket.peer == peer]:
            for chunk in self.sends.pop(index).chunks:
                chunk.drop()
        for handle in self.lists.pop(peer, ()):
            release(handle)


def prepare_sends(
    agent: Any, program: TransferProgram, identities: dict[str, str], chunk_segments: int, deadline: Deadline
) -> NixlPrepared:
    """Descriptor lists per peer and kind of memory, and a handle per chunk of every bucket."""
    prepared = NixlPrepared(program, {}, {})
    for peer in sorted({bucket.peer for bucket in program.sends}):
        buckets = [bucket for bucket in program.sends if bucket.peer == peer]
        sends = {b.index: PreparedBucket(b, [], f"moving bucket {b.index} ({b.nbytes} bytes)") for b in buckets}
        for (local, remote), rows, owners in _by_memory(program, peer, buckets):
            try:
                lists = _lists(agent, identities[peer], peer, local, remote, rows)
            except TransportError:
                prepared.drop(peer)
                raise
            prepared.lists.setdefault(peer, []).extend(lists)
            for owner, group in groupby(range(len(owners)), key=owners.__getitem__):
                indices = np.fromiter(group, np.int32)
                for start in range(0, len(indices), chunk_segments):
                    chunk = Chunk(*lists, indices[start : start + chunk_segments])
                    chunk.make(agent, peer)
                    sends[owner].chunks.append(chunk)
                    if deadline.expired():
                        raise DeadlineError(f"preparing transfers to {peer}", deadline.seconds, [])
        prepared.sends.update(sends)
    return prepared


def _by_memory(
    program: TransferProgram, peer: str, buckets: list[Bucket]
) -> Iterator[tuple[tuple[str, str], Any, list[int]]]:
    """Per (local, remote) kind of memory: both sides' rows of (address, bytes, device number), every row's bucket."""
    remote_regions = program.remote_regions[peer]
    rows = np.concatenate([bucket.segments for bucket in buckets])
    owners = np.repeat([bucket.index for bucket in buckets], [len(bucket.segments) for bucket in buckets])
    keep = rows["nbytes"] > 0
    rows, owners = rows[keep], owners[keep]
    if not len(rows):
        return
    local = [(region.address, *_device(str(region.device))) for region in program.regions]
    remote = [(region.address, *_device(region.device)) for region in remote_regions]
    sides = []
    for table, region, offset in ((local, "region", "offset"), (remote, "remote_region", "remote_offset")):
        address = np.array([entry[0] for entry in table], np.uint64)[rows[region]] + rows[offset].astype(np.uint64)
        number = np.array([entry[2] for entry in table], np.uint64)[rows[region]]
        kind = np.array([entry[1] for entry in table])[rows[region]]
        sides.append((np.stack([address, rows["nbytes"].astype(np.uint64), number], axis=1), kind))
    (here, here_kind), (there, there_kind) = sides
    for kinds in sorted(set(zip(here_kind.tolist(), there_kind.tolist(), strict=True))):
        chosen = (here_kind == kinds[0]) & (there_kind == kinds[1])
        yield kinds, (here[chosen], there[chosen]), owners[chosen].tolist()


def _device(device: str) -> tuple[str, int]:
    """NIXL's kind of memory and device number of `cpu` or `cuda:3`."""
    kind, _, number = device.partition(":")
    return MEMORY[kind], int(number or 0)


def _lists(agent: Any, identity: str, peer: str, local: str, remote: str, rows: Any) -> tuple[Any, Any]:
    here, there = rows
    extent = f"{len(here)} segments, {int(here[:, 1].sum())} bytes"
    with translated(f"preparing {extent} of local {local} memory"):
        first = agent.prep_xfer_dlist("NIXL_INIT_AGENT", here, local)
    try:
        with translated(f"preparing {extent} of {peer}'s {remote} memory", peer):
            return first, agent.prep_xfer_dlist(identity, there, remote)
    except TransportError:
        release(first)
        raise


@dataclass(slots=True, eq=False)
class NixlWork:
    """One posted bucket."""

    lane: Lane
    send: PreparedBucket
    message: bytes
    after: Event | None
    started: int = 0
    """Chunks that were posted."""
    finished: int = 0
    """Chunks that are complete."""
    done: bool = False
    error: TransportError | None = None

    def poll(self) -> bool:
        """Whether every byte and the message have left; raises what prevented it, again and again."""
        with self.lane.lock:
            self.lane.advance()
            if self.error is not None:
                raise self.error
            return self.done

    def cancel(self) -> None:
        """Give it up: queued chunks are never posted, active ones are aborted where the network can."""
        with self.lane.lock:
            if not self.done:
                self.lane.give_up(self, None)


@dataclass(slots=True, eq=False)
class Lane:
    """Everything posted to one peer: at most `depth` transfers in flight, the rest in order of posting."""

    lock: threading.RLock
    """The transport's: held by whoever calls anything here."""
    agent: Any
    peer: str
    identity: str
    depth: int
    lost: Callable[[TransportError], None]
    """Told about the first failure."""
    works: list[NixlWork] = field(default_factory=list)
    flight: list[tuple[NixlWork, Chunk]] = field(default_factory=list)

    def advance(self) -> None:
        """See what has completed, then start what may start. Never waits, never raises: errors stay with their work."""
        for work, chunk in list(self.flight):
            if (work, chunk) in self.flight:
                self._guard(work, self._check, work, chunk)
        for work in list(self.works):
            if not work.done and (work.after is None or work.after.query()):
                self._guard(work, self._start, work)

    def give_up(self, work: NixlWork, error: TransportError | None) -> None:
        """End a work, with an error or without."""
        for entry in [entry for entry in self.flight if entry[0] is work]:
            self.flight.remove(entry)
            entry[1].drop()
        work.error = error
        self._end(work)

    def fail(self, error: TransportError) -> None:
        """End everything with an error."""
        for work in list(self.works):
            self.give_up(work, error)

    def _guard(self, work: NixlWork, step: Callable[..., None], *arguments: Any) -> None:
        try:
            with translated(work.send.what, self.peer):
                step(*arguments)
        except TransportError as error:
            self.give_up(work, error)
            self.lost(error)

    def _check(self, work: NixlWork, chunk: Chunk) -> None:
        if self.agent.check_xfer_state(chunk.handle) == "DONE":
            self.flight.remove((work, chunk))
            self._complete(work)

    def _start(self, work: NixlWork) -> None:
        """Post its next chunks. The last one carries the message, so it goes when all others are complete."""
        chunks = work.send.chunks
        if not chunks:
            self.agent.send_notif(self.identity, work.message)
            self._end(work)
        while work.started < len(chunks) and len(self.flight) < self.depth:
            last = work.started == len(chunks) - 1
            if last and work.finished < work.started:
                return
            chunk = chunks[work.started]
            chunk.make(self.agent, self.peer)
            work.started += 1
            self.flight.append((work, chunk))
            if self.agent.transfer(chunk.handle, work.message if last else b"") == "DONE":
                self.flight.remove((work, chunk))
                self._complete(work)

    def _complete(self, work: NixlWork) -> None:
        work.finished += 1
        if work.finished == len(work.send.chunks):
            self._end(work)

    def _end(self, work: NixlWork) -> None:
        work.done = True
        work.send.active = False
        if work in self.works:
            self.works.remove(work)
