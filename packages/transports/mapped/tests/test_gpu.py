"""From one process's CUDA memory to another's on the same GPU, by IPC handles."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import pytest
import torch

from weft.contracts import SEGMENT, Bucket, TransferProgram, Transport
from weft.deadline import Deadline
from weft.member import Member, Region, RemoteRegion, Tag
from weft_mapped import factory

pytestmark = pytest.mark.gpu
SECONDS, POISON, SIZE = 120.0, 0xA5, 80 << 20
VERSIONS = 3


def endpoint(name: str) -> tuple[Transport, Region]:
    transport = factory({})
    transport.open(member(name))
    region = Region("memory", torch.full((SIZE,), POISON, dtype=torch.uint8, device="cuda:0"))
    transport.register(region, Deadline.after(SECONDS))
    return transport, region


def member(name: str) -> Member:
    return Member(name, "source", "target", None, 0, "here", "here", "cuda:0")


def receive(sender: Connection) -> None:
    """The other process: says where its memory is, and what it holds after each version."""
    transport, region = endpoint("b")
    sender.send_bytes(msgspec.msgpack.encode((transport.address(), region.address)))
    transport.connect(member("a"), sender.recv_bytes(), Deadline.after(SECONDS))
    for _ in range(VERSIONS):
        arrived: list[object] = []
        Deadline.after(SECONDS).wait(lambda into=arrived: bool(into.extend(transport.poll()) or into), "it", list)
        sender.send_bytes(region.memory.cpu().numpy().tobytes())
        region.memory.fill_(POISON)
        torch.cuda.synchronize()
        sender.send_bytes(b"again")
    sender.recv_bytes()
    transport.close()


def test_segments_move_between_processes_on_one_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = np.zeros(201, SEGMENT)
    rows["nbytes"][0], rows["nbytes"][1:] = 70 << 20, 1000
    rows["offset"][1:] = rows["remote_offset"][1:] = (70 << 20) + 1001 * np.arange(200)
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=receive, args=(far,), daemon=True)
    process.start()
    transport, region = endpoint("a")
    address, there = msgspec.msgpack.decode(near.recv_bytes(), type=tuple[bytes, int])
    near.send_bytes(transport.address())
    transport.connect(member("b"), address, Deadline.after(SECONDS))
    remote = {"b": (RemoteRegion(there, SIZE, "cuda:0"),)}
    program = TransferProgram(b"key", (Bucket(0, "b", rows),), (), (region,), remote)
    prepared = transport.prepare(program, Deadline.after(SECONDS))
    for version in range(VERSIONS):
        region.memory.random_(0, 256)  # the post comes after it, though it may not have run yet
        work = transport.post(prepared, 0, Tag(version, "a", 0, 0), b"", None)
        Deadline.after(SECONDS).wait(work.poll, "the post", lambda: ["b"])
        expected = torch.full((SIZE,), POISON, dtype=torch.uint8)
        for _, offset, _, _, nbytes in rows.tolist():
            expected[offset : offset + nbytes] = region.memory[offset : offset + nbytes].cpu()
        assert near.recv_bytes() == expected.numpy().tobytes()
        assert near.recv_bytes() == b"again"
    near.send_bytes(b"the end")
    process.join(SECONDS)
    assert process.exitcode == 0
    transport.close()
