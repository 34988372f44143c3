"""Endpoints of the nccl transport in one process, with torch's gloo in NCCL's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist

from weft.batches import Limits
from weft.contracts import SEGMENT, Bucket, Capabilities, TransferProgram
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError, RecordError, TransportError
from weft.granted import Address, GrantedTransport
from weft.member import Member, Region, RemoteRegion, Tag
from weft_nccl import factory
from weft_nccl.gloo import GlooChannel, GlooNetwork

SIZE = 100_000
MEMBERS = {name: Member(name, None, None, None, 0, "here", "here", "cpu") for name in "ab"}


class CountedNetwork(GlooNetwork):
    """Counts its channels."""

    made = 0

    def channel(self, invitation: bytes, peer: str, sends: bool, ended: Callable[[], None]) -> GlooChannel:
        self.made += 1
        return super().channel(invitation, peer, sends, ended)


@pytest.fixture
def opened() -> Iterator[Callable[..., Any]]:
    ends: list[Any] = []

    def open_one(end: Any, name: str) -> Any:
        ends.append(end)
        end.open(MEMBERS[name])
        return end

    yield open_one
    for end in ends:
        end.close()


def counted(network: GlooNetwork) -> GrantedTransport:
    capabilities = Capabilities(False, ("cpu",), True, 1, 1 << 20)
    return GrantedTransport("nccl", network, capabilities, Limits(4096, 4, 100, 1024), 2, lambda member: "127.0.0.1")


class BrokenEvent:
    """An event after a kernel that failed."""

    def query(self) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")

    def synchronize(self) -> None:
        raise AssertionError("a transport must not block on an event")


@pytest.mark.trap(29)
def test_channels_are_made_once_and_serve_later_programs_and_after_failed_posts(
    opened: Callable[..., Any],
) -> None:
    networks = [CountedNetwork(1024) for _ in "ab"]
    a, b = (opened(counted(network), name) for network, name in zip(networks, "ab", strict=True))
    deadline = Deadline.after(120)
    regions = [Region("r", torch.zeros(SIZE, dtype=torch.uint8)) for _ in "ab"]
    for end, region in ((a, regions[0]), (b, regions[1])):
        end.register(region, deadline)
    a.connect(MEMBERS["b"], b.address(), deadline)
    b.connect(MEMBERS["a"], a.address(), deadline)
    rows = np.zeros(1, SEGMENT)
    rows["nbytes"] = SIZE
    remote = [(RemoteRegion(r.address, r.nbytes, "cpu"),) for r in regions]
    for number in range(3):
        key = b"program %d" % number
        regions[0].memory.random_(0, 256)
        regions[1].memory.fill_(0xA5)
        into = b.prepare(TransferProgram(key, (), (Bucket(0, "a", rows),), (regions[1],), {"a": remote[0]}), deadline)
        out = a.prepare(TransferProgram(key, (Bucket(0, "b", rows),), (), (regions[0],), {"b": remote[1]}), deadline)
        work = a.post(out, 0, Tag(number, "a", 0, 0), b"", None)
        deadline.wait(work.poll, "the post", list)
        deadline.wait(lambda: bool(b.poll()), "arrival", list)
        assert torch.equal(*(region.memory for region in regions))
        with pytest.raises(TransportError, match=r"bucket 0 waited for is broken: CUDA error: .* encountered$"):
            deadline.wait(a.post(out, 0, Tag(number, "a", 0, 0), b"", BrokenEvent()).poll, "an error", list)
        a.release(out)
        b.release(into)
    assert [network.made for network in networks] == [1, 1]
    assert not dist.is_initialized()


@pytest.mark.trap(42)
def test_members_with_other_sizes_or_another_backend_refuse_each_other(opened: Callable[..., Any]) -> None:
    one = opened(factory({"backend": "gloo", "host": "127.0.0.1"}), "a")
    other = opened(factory({"backend": "gloo", "host": "127.0.0.1", "operations": 7}), "b")
    with pytest.raises(ConfigError, match=r"67108864, 256.*67108864, 7.*make the options equal"):
        one.connect(MEMBERS["b"], other.address(), Deadline.after(1))
    address = msgspec.structs.replace(msgspec.msgpack.decode(one.address(), type=Address), network="nccl over NCCL")
    with pytest.raises(RecordError, match=r"it is of nccl over NCCL, this one of nccl over gloo"):
        one.connect(MEMBERS["b"], msgspec.msgpack.encode(address), Deadline.after(1))


@pytest.mark.trap(40, 48)
def test_prepare_names_peers_that_have_not_come(opened: Callable[..., Any]) -> None:
    for name, peer in ("ab", "ba"):
        one = opened(factory({"backend": "gloo", "host": "127.0.0.1"}), name)
        two = opened(factory({"backend": "gloo", "host": "127.0.0.1"}), peer)
        one.connect(MEMBERS[peer], two.address(), Deadline.after(20))
        with pytest.raises(DeadlineError, match=rf"connecting: not within 0\.2 s; late: {peer}"):
            one.prepare(TransferProgram(b"key", (), (), (), {}), Deadline.after(0.2))
