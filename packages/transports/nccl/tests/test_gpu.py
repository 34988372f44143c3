"""NCCL itself. One GPU carries a communicator that sends to itself; the transport needs two."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from weft.contracts import SEGMENT, Bucket, Message, TransferProgram
from weft.deadline import Deadline
from weft.member import Member, Region, RemoteRegion, Tag
from weft_nccl import factory
from weft_nccl.communicator import CudaLane
from weft_nccl.library import load

pytestmark = pytest.mark.gpu


def test_a_communicator_of_one_moves_a_group_to_itself_and_is_aborted() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    library, lane = load("libnccl.so.2"), CudaLane(torch.device("cuda:0"))
    source = torch.arange(1 << 20, device="cuda:0").to(torch.uint8)
    target = torch.full_like(source, 0xA5)
    with lane.within():
        communicator = library.begin(library.unique_id(), 1, 0, 16)
        Deadline.after(60).wait(lambda: library.settled(communicator), "making it", list)
        torch.cuda.synchronize()
        with library.group():
            library.send(communicator, source.data_ptr(), source.numel(), 0, lane.handle)
            library.receive(communicator, target.data_ptr(), target.numel(), 0, lane.handle)
        Deadline.after(60).wait(lambda: library.settled(communicator), "issuing", list)
        Deadline.after(60).wait(lane.mark().query, "moving", list)
    assert torch.equal(source, target)
    library.abort(communicator)


def test_the_transport_moves_straight_and_packed_segments_between_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL refuses two members on one GPU, and there are not two")
    size, deadline = 80 << 20, Deadline.after(120)
    rows = np.zeros(201, SEGMENT)
    rows["nbytes"][0], rows["nbytes"][1:] = 70 << 20, 1000
    rows["offset"][1:] = rows["remote_offset"][1:] = (70 << 20) + 1001 * np.arange(200)
    members = [Member(name, "s", "t", None, 0, "here", "here", f"cuda:{i}") for i, name in enumerate("ab")]
    memory = [torch.full((size,), 0xA5, dtype=torch.uint8, device=member.device) for member in members]
    memory[0].copy_(torch.randint(0, 256, (size,), dtype=torch.uint8))
    expected = torch.full((size,), 0xA5, dtype=torch.uint8)
    for _, offset, _, _, nbytes in rows.tolist():
        expected[offset : offset + nbytes] = memory[0][offset : offset + nbytes].cpu()
    ends = [factory({"host": "127.0.0.1"}) for _ in members]
    with contextlib.ExitStack() as stack:
        for end, member in zip(ends, members, strict=True):
            stack.callback(end.close)
            end.open(member)
        regions = [Region("r", each) for each in memory]
        for end, region in zip(ends, regions, strict=True):
            end.register(region, deadline)
        for end, other, peer in zip(ends, reversed(ends), reversed(members), strict=True):
            end.connect(peer, other.address(), deadline)
        remote = [{"b": _remote(regions[1])}, {"a": _remote(regions[0])}]
        out = TransferProgram(b"key", (Bucket(0, "b", rows),), (), (regions[0],), remote[0])
        into = TransferProgram(b"key", (), (Bucket(0, "a", rows),), (regions[1],), remote[1])
        ends[1].prepare(into, deadline)
        prepared = ends[0].prepare(out, deadline)
        for version in range(3):
            memory[1].fill_(0xA5)
            torch.cuda.synchronize(memory[1].device)
            work = ends[0].post(prepared, 0, Tag(version, "a", 0, 0), b"", None)
            deadline.wait(work.poll, "the post", lambda: ["b"])
            arrived: list[Message] = []
            deadline.wait(lambda arrived=arrived: bool(arrived.extend(ends[1].poll()) or arrived), "it", lambda: ["a"])
            assert torch.equal(memory[1].cpu(), expected)


def _remote(region: Region) -> tuple[RemoteRegion, ...]:
    return (RemoteRegion(region.address, region.nbytes, str(region.device)),)
