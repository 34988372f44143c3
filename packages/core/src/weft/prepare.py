"""Preparing: everything between a plan and its first byte that does not depend on the version.

Views, segments, staging memory and digests' index tables are made here, once per plan and set of endpoints; a warm
refit makes none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weft.contracts import Bucket, TransferProgram
from weft.copies import Copies
from weft.digest import Runs, tensor_seed
from weft.digesters import Digester, Digesters, Held
from weft.errors import LayoutError, RecordError
from weft.layout import ITEM_BYTES, Layout
from weft.lower import SLOTS, LoweredBucket, MemberProgram
from weft.member import Member, Region, RemoteRegion, regions_of
from weft.rendezvous import EndpointRecord
from weft.segments import Binding, packed_segments, segments
from weft.slices import Slice
from weft.views import Memory, source_view, target_view, torch_dtype

Move = tuple[torch.Tensor, torch.Tensor]
"""(destination, source) views of equal shape."""


@dataclass(frozen=True, slots=True)
class Step:
    """One bucket, ready to be replayed at one of its ends."""

    bucket: LoweredBucket
    moves: tuple[Move, ...]
    """Buffers → slot at the source, slot → buffers at the target; empty for direct buckets."""
    digest: Digester | None
    """Computes its digest, over the bits that travel; None when digests are off."""


@dataclass(frozen=True, slots=True)
class LocalMoves:
    """The copies within a member of one group of its target layout."""

    moves: tuple[Move, ...]
    digest: Digester | None
    """Of those that count, once they are done; None when none does, or digests are off."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One member's memory as the others see it: regions, and where buffers and staging slots lie in them."""

    regions: tuple[Region, ...]
    source: Binding
    """Of what it sends: its source's buffers or, where it has no source and passes on, its target's."""
    target: Binding
    incoming: Mapping[str, tuple[int, int]]
    """Per sender of packed buckets: region and byte offset of its first staging slot."""
    outgoing: Mapping[str, tuple[int, int]]
    """Per receiver of packed buckets: the same at this end."""

    @property
    def staging_bytes(self) -> int:
        """Size of the staging slots, both ways."""
        used = {region for slots in (self.incoming, self.outgoing) for region, _ in slots.values()}
        return sum(self.regions[n].nbytes for n in used)


def make_endpoint(
    program: MemberProgram, source: tuple[Layout, Memory] | None, target: tuple[Layout, Memory] | None
) -> Endpoint:
    """Find the regions of all buffers and allocate the staging slots.

    Raises `LayoutError` when memory does not match its layout, naming every buffer.
    """
    faults: list[str] = []
    tensors: list[tuple[str, torch.Tensor]] = []
    for side in (source, target):
        for buffer in side[0].buffers if side else ():
            memory = side[1].get(buffer.name) if side else None
            wanted = f"buffer {buffer.name} should be {buffer.numel} dense elements of {buffer.dtype}"
            if memory is None:
                faults.append(f"{wanted}; memory() does not have it")
            elif (
                memory.numel() != buffer.numel
                or memory.dtype != torch_dtype(buffer.dtype)
                or not memory.is_contiguous()
            ):
                faults.append(f"{wanted}; memory() gives {memory.numel()} of {memory.dtype}, strides {memory.stride()}")
            else:
                tensors.append((buffer.name, memory))
    if faults:
        raise LayoutError(faults)
    regions = regions_of(tensors)
    slots: list[dict[str, tuple[int, int]]] = []
    device = tensors[0][1].device if tensors else torch.device("cpu")
    for label, buckets in (("incoming", program.receives), ("outgoing", program.sends)):
        peers = sorted({bucket.peer for bucket in buckets if bucket.slot is not None})
        slots.append({peer: (len(regions), n * SLOTS * program.slot_bytes) for n, peer in enumerate(peers)})
        if peers:
            staging = torch.zeros(len(peers) * SLOTS * program.slot_bytes, dtype=torch.uint8, device=device)
            regions.append(Region(f"staging-{label}", staging))
    bindings = [_bind(side, regions) for side in (source or target, target)]
    return Endpoint(tuple(regions), bindings[0], bindings[1], slots[0], slots[1])


def _bind(side: tuple[Layout, Memory] | None, regions: Sequence[Region]) -> Binding:
    starts = {region.address: n for n, region in enumerate(regions)}
    found: list[tuple[int, int]] = []
    for buffer in side[0].buffers if side else ():
        memory = side[1][buffer.name] if side else torch.empty(0)
        base = memory.untyped_storage().data_ptr()
        found.append((starts[base], memory.data_ptr() - base) if memory.numel() else (0, 0))
    columns = np.array(found, dtype=np.int64).reshape(-1, 2)
    return Binding(columns[:, 0], columns[:, 1])


def endpoint_record(
    name: str, incarnation: int, memory_epoch: int, address: bytes, endpoint: Endpoint, fingerprint: str
) -> EndpointRecord:
    """What peers are told in the second round of the rendezvous."""
    columns = [
        np.ascontiguousarray(column, dtype="<i8").tobytes()
        for binding in (endpoint.source, endpoint.target)
        for column in (binding.region, binding.offset)
    ]
    return EndpointRecord(
        name=name, incarnation=incarnation, memory_epoch=memory_epoch, address=address,
        regions=tuple(RemoteRegion(r.address, r.nbytes, str(r.device)) for r in endpoint.regions),
        source_region=columns[0], source_offset=columns[1], target_region=columns[2], target_offset=columns[3],
        fingerprint=fingerprint, slots=dict(endpoint.incoming), outgoing_slots=dict(endpoint.outgoing),
    )  # fmt: skip


def transfer_program(
    own: Slice,
    program: MemberProgram,
    endpoint: Endpoint,
    peers: Mapping[str, EndpointRecord],
    members: Sequence[Member],
) -> TransferProgram:
    """Lower a member's buckets to segments, now that every address is known.

    `members` are all of the job, so that both ends of a bucket come to the same key.
    """
    width = own.item_bytes

    def lowered(bucket: LoweredBucket, sending: bool) -> Bucket:
        peer, itemsize = peers[bucket.peer], width[bucket.copies.tensor]
        _check_peer(program.name, bucket, peer, sending)
        ends = (endpoint.source, _columns(peer.target_region, peer.target_offset)) if sending else (
            _columns(peer.source_region, peer.source_offset), endpoint.target
        )  # fmt: skip
        if bucket.slot is None:
            return Bucket(bucket.index, bucket.peer, segments(bucket.copies, itemsize, *ends, sending))
        step = bucket.slot * program.slot_bytes
        mine = (endpoint.outgoing if sending else endpoint.incoming)[bucket.peer]
        theirs = (peer.slots if sending else peer.outgoing_slots)[program.name]
        slots = [(region, offset + step) for region, offset in ((mine, theirs) if sending else (theirs, mine))]
        rows = packed_segments(bucket, itemsize, *ends, (slots[0], slots[1]), sending)
        return Bucket(bucket.index, bucket.peer, rows)

    sends = tuple(lowered(bucket, True) for bucket in program.sends)
    receives = tuple(lowered(bucket, False) for bucket in program.receives)
    key = hashlib.sha256(own.fingerprint.encode())
    for member in sorted(members, key=lambda member: member.name):
        key.update(f"{member.name}/{member.incarnation}/{member.memory_epoch}".encode())
    remote = {name: tuple(record.regions) for name, record in peers.items()}
    return TransferProgram(key.digest(), sends, receives, endpoint.regions, remote)


def _check_peer(name: str, bucket: LoweredBucket, peer: EndpointRecord, sending: bool) -> None:
    """Raise `RecordError` for an endpoint without the buffers, or the staging slots, that the plan has there."""
    copies = bucket.copies
    buffers, column, slots = (
        (copies.target_buffer, peer.target_region, peer.slots)
        if sending
        else (copies.source_buffer, peer.source_region, peer.outgoing_slots)
    )
    if int(buffers.max(initial=-1)) >= len(column) // 8 or (bucket.slot is not None and name not in slots):
        raise RecordError(f"the endpoint of {peer.name} lacks buffers or staging slots that the plan has there")


def _columns(region: bytes, offset: bytes) -> Binding:
    return Binding(np.frombuffer(region, dtype="<i8"), np.frombuffer(offset, dtype="<i8"))


def make_steps(
    own: Slice, program: MemberProgram, endpoint: Endpoint, side: tuple[Layout, Memory], sending: bool,
    digesters: Digesters | None,
) -> list[Step]:  # fmt: skip
    """The views and digest tables of every bucket that this member sends (or receives).

    `side` is what it sends from (its source or, without one, its target) or receives into; without `digesters` nothing
    is digested.
    """
    layout, memory = side
    steps: list[Step] = []
    for bucket in program.sends if sending else program.receives:
        if bucket.slot is None:
            copies = bucket.copies
            held = (copy_runs(own, copies, n, layout, memory, sending) for n in range(len(copies)))
            steps.append(Step(bucket, (), digesters.of([*held]) if digesters else None))
            continue
        region, offset = (endpoint.outgoing if sending else endpoint.incoming)[bucket.peer]
        begin = offset + bucket.slot * program.slot_bytes
        slot = endpoint.regions[region].memory[begin : begin + program.slot_bytes]
        steps.append(_packed_step(own, bucket, layout, memory, slot, sending, digesters))
    return steps


def _packed_step(
    own: Slice, bucket: LoweredBucket, layout: Layout, memory: Memory, slot: torch.Tensor, sending: bool,
    digesters: Digesters | None,
) -> Step:  # fmt: skip
    """Only what passes through the slot at this end is moved here; all is digested where it travels to or from."""
    copies = bucket.copies
    moves: list[Move] = []
    held: list[Held] = []
    staged = bucket.gathered if sending else bucket.scattered
    buffers = copies.source_buffer if sending else copies.target_buffer
    for n, offset in enumerate(bucket.offsets.tolist()):
        if not staged[n]:
            if digesters:
                held.append(copy_runs(own, copies, n, layout, memory, sending))
            continue
        tensor = own.tensors[copies.tensor[n]]
        itemsize = ITEM_BYTES[tensor.target_dtype]
        sizes = copies.sizes[n].tolist()
        nbytes = int(copies.numel[n]) * itemsize
        dense = slot[offset : offset + nbytes].view(torch_dtype(tensor.target_dtype)).view(sizes)
        view = (source_view if sending else target_view)(copies, n, memory[layout.buffers[buffers[n]].name])
        moves.append((dense, view) if sending else (view, dense))
        if digesters:
            strides = [1] * len(sizes)
            for axis in range(len(sizes) - 2, -1, -1):
                strides[axis] = strides[axis + 1] * sizes[axis + 1]
            start, distance = int(copies.logical_start[n]), copies.logical_strides[n].tolist()
            nest = Runs.of_nest(tensor_seed(tensor.name), itemsize, offset, start, sizes, strides, distance)
            held.append((slot, nest))
    return Step(bucket, tuple(moves), digesters.of(held) if digesters else None)


def copy_runs(own: Slice, copies: Copies, n: int, layout: Layout, memory: Memory, sending: bool) -> Held:
    """Where copy n's digest is computed in the sender's (or target's) own buffer, which has the bits that travel."""
    tensor = own.tensors[copies.tensor[n]]
    itemsize = ITEM_BYTES[tensor.target_dtype]
    buffer, offset, strides = (
        (copies.source_buffer, copies.source_offset, copies.source_strides)
        if sending
        else (copies.target_buffer, copies.target_offset, copies.target_strides)
    )
    nest = Runs.of_nest(
        tensor_seed(tensor.name), itemsize, int(offset[n]) * itemsize, int(copies.logical_start[n]),
        copies.sizes[n].tolist(), strides[n].tolist(), copies.logical_strides[n].tolist(),
    )  # fmt: skip
    return memory[layout.buffers[buffer[n]].name], nest


def local_moves(
    own: Slice, program: MemberProgram, source: tuple[Layout, Memory], target: tuple[Layout, Memory],
    digesters: Digesters | None,
) -> dict[int, LocalMoves]:  # fmt: skip
    """Copies within this member by group of its target layout."""
    copies = program.local
    moves: dict[int, list[Move]] = {}
    held: dict[int, list[Held]] = {}
    for n in range(len(copies)):
        given = source[1][source[0].buffers[copies.source_buffer[n]].name]
        wanted = target[1][target[0].buffers[copies.target_buffer[n]].name]
        group = int(copies.group[n])
        moves.setdefault(group, []).append((target_view(copies, n, wanted), source_view(copies, n, given)))
        if copies.counted[n]:
            held.setdefault(group, []).append(copy_runs(own, copies, n, target[0], target[1], False))
    return {
        group: LocalMoves(tuple(each), digesters.of(held[group]) if digesters and group in held else None)
        for group, each in moves.items()
    }
