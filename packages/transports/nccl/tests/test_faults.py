"""What must cost no endpoint and no place: strangers, a program released after its grant, words of a lost peer."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from weft.contracts import SEGMENT, Bucket, TransferProgram
from weft.deadline import Deadline
from weft.endpoint import Envelope
from weft.errors import PeerLostError
from weft.member import Member, Region, RemoteRegion, Tag
from weft.passages import Ask, Go
from weft_nccl import factory

MEMBERS = {name: Member(name, None, None, None, 0, "here", "here", "cpu") for name in "ab"}
SIZE = 1000


@pytest.fixture
def pair() -> Iterator[tuple[Any, Any]]:
    ends = [factory({"backend": "gloo", "host": "127.0.0.1"}) for _ in "ab"]
    for end, name in zip(ends, "ab", strict=True):
        end.open(MEMBERS[name])
    yield ends[0], ends[1]
    for end in ends:
        end.close()


def prepared(a: Any, b: Any, deadline: Deadline) -> tuple[Any, Any]:
    regions = [Region("r", torch.full((SIZE,), fill, dtype=torch.uint8)) for fill in (7, 0xA5)]
    a.register(regions[0], deadline)
    b.register(regions[1], deadline)
    a.connect(MEMBERS["b"], b.address(), deadline)
    b.connect(MEMBERS["a"], a.address(), deadline)
    rows = np.zeros(1, SEGMENT)
    rows["nbytes"] = SIZE
    remote = [(RemoteRegion(r.address, r.nbytes, "cpu"),) for r in regions]
    into = b.prepare(TransferProgram(b"key", (), (Bucket(0, "a", rows),), (regions[1],), {"a": remote[0]}), deadline)
    out = a.prepare(TransferProgram(b"key", (Bucket(0, "b", rows),), (), (regions[0],), {"b": remote[1]}), deadline)
    return out, into


def test_a_stranger_who_says_what_is_no_text_ends_nothing(pair: tuple[Any, Any]) -> None:
    a, b = pair
    body = b"\x92\xa1\xff\xa1a"
    with socket.create_connection(("127.0.0.1", msgspec.msgpack.decode(a.address())[3]), timeout=60) as stranger:
        stranger.sendall(struct.pack("<I", len(body)) + body)
        stranger.recv(1)
    prepared(a, b, Deadline.after(60))


def test_a_program_released_between_grant_and_go_costs_no_peer(pair: tuple[Any, Any]) -> None:
    a, b = pair
    out, into = prepared(a, b, Deadline.after(60))
    incoming = b._exchange._incoming
    grants: Callable[..., Any] = incoming.grants

    def release_then(ready: Any) -> Any:
        granted = grants(ready)
        if granted:
            b.release(into)
        return granted

    incoming.grants = release_then
    work = a.post(out, 0, Tag(1, "a", 0, 0), b"", None)

    def over() -> bool:
        b.poll()
        return bool(work.poll())

    Deadline.after(60).wait(over, "the post", list)


def test_what_a_lost_peer_still_said_takes_no_place(pair: tuple[Any, Any]) -> None:
    a, b = pair
    prepared(a, b, Deadline.after(60))
    exchange = b._exchange
    ask = Ask(5, [Envelope(Tag(1, "a", 0, 0), 0, b"", b"key")])
    with exchange._lock:
        exchange._control._events += [("a", msgspec.msgpack.encode(said)) for said in (Go(99), ask)]
    exchange.wake()

    def lost() -> bool:
        try:
            b.poll()
        except PeerLostError:
            return True
        return False

    Deadline.after(60).wait(lost, "the loss", list)
    Deadline.after(60).wait(lambda: not exchange._control._events, "events", list)
    with exchange._lock:
        assert exchange._incoming.turns == {}, "a lost peer holds a place for ever"


@pytest.mark.parametrize(
    "said",
    [b"\xc1", b"\x92\x01\xc4\x01\xc1", b"\x93\x03\x01" + b"\x91" * 200_000],
    ids=["nothing", "an invitation that is none", "nested without end"],
)
def test_who_says_what_means_nothing_is_lost_and_nobody_else_is(pair: tuple[Any, Any], said: bytes) -> None:
    a, b = pair
    prepared(a, b, Deadline.after(60))
    exchange = b._exchange
    with exchange._lock:
        exchange._control._events.append(("a", said))
    exchange.wake()
    reasons = []

    def lost() -> bool:
        try:
            b.poll()
        except PeerLostError as error:
            reasons.append(str(error))
        return bool(reasons)

    Deadline.after(60).wait(lost, "the loss", list)
    assert "a sent " in reasons[0]
    assert exchange.alive
