"""Prepared programs as NIXL's descriptor lists and transfer handles."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch

from weft.contracts import Bucket, TransferProgram
from weft.deadline import Deadline
from weft.errors import DeadlineError, TransportError
from weft_nixl.library import FOREIGN, translated

_LOG = logging.getLogger(__name__)

MEMORY = {"cpu": "DRAM", "cuda": "VRAM"}
"""NIXL's name for the memory of a device type."""


@dataclass(slots=True, eq=False)
class Chunk:
    """One transfer of a bucket; its handle is made once and posted again for every version."""

    operation: str
    """`WRITE` or `READ`."""
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
                self.handle = agent.make_prepped_xfer(self.operation, self.local, self.rows, self.remote, self.rows)

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
class Moved:
    """One bucket at the end that moves its bytes; at the other one it has no chunks."""

    bucket: Bucket
    program: TransferProgram
    what: str
    """For errors; made once, since adding up its bytes takes time."""
    chunks: list[Chunk] = field(default_factory=list)
    active: bool = False
    """Whether it is posted."""


@dataclass(slots=True, eq=False)
class Held:
    """Handles and descriptor lists that refer to one peer."""

    chunks: list[Chunk] = field(default_factory=list)
    lists: list[Any] = field(default_factory=list)

    def drop(self) -> None:
        """Release them, the handles first."""
        for chunk in self.chunks:
            chunk.drop()
        for each in self.lists:
            release(each)


@dataclass(slots=True, eq=False)
class NixlPrepared:
    """A program, ready to be moved."""

    program: TransferProgram
    sends: dict[int, Moved]
    receives: dict[int, Moved]
    """Where the receiver moves the bytes; empty where the sender does."""
    lists: dict[str, list[Any]] = field(default_factory=dict)
    """Descriptor lists by peer."""
    flushed: dict[int, list[torch.device]] = field(default_factory=dict)
    """GPUs that a bucket comes to."""

    def __post_init__(self) -> None:
        gpus = [region.device if region.device.type == "cuda" else None for region in self.program.regions]
        for bucket in self.program.receives if any(gpus) else ():
            found = {gpus[index] for index in np.unique(bucket.segments["region"]).tolist()}
            self.flushed[bucket.index] = sorted((gpu for gpu in found if gpu is not None), key=str)

    def forget(self, peer: str) -> Held:
        """Everything that refers to one peer; its buckets are not here any more."""
        held = Held(lists=self.lists.pop(peer, []))
        for moved in (self.sends, self.receives):
            for index in [index for index, each in moved.items() if each.bucket.peer == peer]:
                held.chunks += moved.pop(index).chunks
        return held

    def drop(self) -> None:
        """Release all of it."""
        for peer in {*self.lists, *(each.bucket.peer for each in (*self.sends.values(), *self.receives.values()))}:
            self.forget(peer).drop()


def moved_of(program: TransferProgram, buckets: Sequence[Bucket]) -> dict[int, Moved]:
    """These buckets by index, without chunks."""
    return {b.index: Moved(b, program, f"moving bucket {b.index} ({b.nbytes} bytes)") for b in buckets}


def prepare(
    agent: Any,
    operation: str,
    prepared: NixlPrepared,
    moved: Mapping[int, Moved],
    identities: Mapping[str, str],
    chunk_segments: int,
    deadline: Deadline,
) -> None:
    """Descriptor lists per peer and kind of memory, and a handle for `operation` per chunk of the buckets `moved`.

    Nothing is left of them when it fails.
    """
    try:
        for peer in sorted(identities):
            buckets = [each.bucket for each in moved.values() if each.bucket.peer == peer]
            for (local, remote), rows, owners in _by_memory(prepared.program, peer, buckets):
                lists = _lists(agent, identities[peer], peer, local, remote, rows)
                prepared.lists.setdefault(peer, []).extend(lists)
                for owner, group in groupby(range(len(owners)), key=owners.__getitem__):
                    indices = np.fromiter(group, np.int32)
                    for start in range(0, len(indices), chunk_segments):
                        chunk = Chunk(operation, *lists, indices[start : start + chunk_segments])
                        moved[owner].chunks.append(chunk)
                        chunk.make(agent, peer)
                        if deadline.expired():
                            raise DeadlineError(f"preparing transfers to {peer}", deadline.seconds, [])
    except (TransportError, DeadlineError):
        for peer in identities:
            prepared.forget(peer).drop()
        raise


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
