"""What a link asks of gloo, without a network: in which order, and how far ahead. The test is the peer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch

from weft.deadline import Deadline
from weft.endpoint import Envelope, encode
from weft.errors import PeerLostError
from weft.member import Tag
from weft_gloo.link import Link
from weft_gloo.messages import Message
from weft_gloo.parcels import HEAD_BYTES, Expected, Parcel

NBYTES = 5000
DEPTH = 2


class Work:
    """gloo's: it can only be waited for."""

    def __init__(self, tensor: torch.Tensor, broken: threading.Event) -> None:
        self.tensor, self.broken, self.done = tensor, broken, threading.Event()

    def wait(self, timeout: timedelta) -> None:
        limit = Deadline.after(timeout.total_seconds())
        limit.wait(lambda: self.done.is_set() or self.broken.is_set(), "a message", list)
        if not self.done.is_set():
            raise RuntimeError("closed by peer\nin pair.cc")


class Group:
    """A process group of two whose other side does what the test says."""

    def __init__(self) -> None:
        self.sends: list[Work] = []
        self.receives: list[Work] = []
        self.broken = threading.Event()

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
        self.sends.append(Work(tensors[0], self.broken))
        return self.sends[-1]

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
        if tensors[0].numel() == 1:  # how `Link.close` ends all waits
            self.broken.set()
        self.receives.append(Work(tensors[0], self.broken))
        return self.receives[-1]

    def payload(self, works: list[Work]) -> list[Work]:
        return [work for work in list(works) if work.tensor.numel() == NBYTES]

    def has(self, works: list[Work], count: int) -> bool:
        assert len(self.payload(works)) <= count, "more are in flight than may be"
        return len(self.payload(works)) == count

    def announce(self, bucket: int) -> None:
        """What the peer's head does that says that this bucket comes."""
        head = next(w for w in list(self.receives) if w.tensor.numel() == HEAD_BYTES and not w.done.is_set())
        envelope = encode(Tag(1, "peer", 0, 0), bucket, b"", b"key")
        wire = len(envelope).to_bytes(4, "little") + envelope
        head.tensor[: len(wire)] = torch.frombuffer(bytearray(wire), dtype=torch.uint8)
        head.done.set()


class Ends:
    """A link and everything that it tells its owner."""

    def __init__(self, messages: int) -> None:
        self.group = Group()
        self.payload = [Message((torch.zeros(NBYTES, dtype=torch.uint8),), NBYTES) for _ in range(messages)]
        self.delivered: list[int | None] = []
        self.lost: list[PeerLostError] = []
        self.may_deliver = threading.Event()
        self.may_deliver.set()
        self.progressed = threading.Event()
        self.link = Link(
            "peer", lambda stopped: self.group, 1, 1000, DEPTH, self._expected, self._deliver, self.lost.append,
            self.progressed.set,
        )  # fmt: skip
        until(lambda: len(self.group.receives) == DEPTH)

    def _expected(self, envelope: Envelope, stopped: Callable[[], bool]) -> Expected:
        return Expected(self.payload)

    def _deliver(self, envelope: Envelope) -> None:
        assert self.may_deliver.wait(60)
        self.delivered.append(envelope.bucket)


@pytest.fixture
def ends() -> Iterator[Callable[[int], Ends]]:
    made: list[Ends] = []

    def make(messages: int) -> Ends:
        made.append(Ends(messages))
        return made[-1]

    yield make
    for each in made:
        each.link.close(Deadline.after(0))


def until(ready: Callable[[], bool]) -> None:
    Deadline.after(60).wait(ready, "the link's threads", list)


def test_the_next_bucket_is_received_before_the_last_byte_of_the_former_and_delivered_after_it(
    ends: Callable[[int], Ends],
) -> None:
    here = ends(1)
    group = here.group
    group.announce(7)
    until(lambda: len(group.payload(group.receives)) == 1)
    group.announce(8)
    until(lambda: len(group.payload(group.receives)) == 2)
    first, second = group.payload(group.receives)
    second.done.set()
    group.announce(9)  # taken in while the first is missing, but nothing more is received: DEPTH are on their way
    assert here.delivered == []
    first.done.set()
    until(lambda: here.delivered == [7, 8])
    until(lambda: len(group.payload(group.receives)) == 3)


def test_the_next_parcel_is_announced_and_sent_before_the_former_has_left(ends: Callable[[int], Ends]) -> None:
    here = ends(1)
    group = here.group
    parcels = [Parcel(bytes([n]) * 10, here.payload) for n in range(3)]
    for parcel in parcels:
        here.link.submit(parcel)
    until(lambda: len(group.sends) == 5)
    assert len(group.payload(group.sends)) == DEPTH, "more are in flight than may be"
    assert not any(parcel.done for parcel in parcels)
    here.link.cancel(parcels[2])
    assert not parcels[2].done, "its head has left, and the peer waits for its payload"
    for work in list(group.sends):
        work.done.set()
    until(lambda: parcels[1].done)
    assert here.progressed.is_set()
    until(lambda: len(group.payload(group.sends)) == 3)


def test_a_bucket_of_many_messages_has_no_more_in_flight_than_depth(ends: Callable[[int], Ends]) -> None:
    here = ends(5)
    group = here.group
    parcel = Parcel(b"envelope", here.payload)
    here.link.submit(parcel)
    here.link.submit(Parcel(b"next", here.payload))
    until(lambda: len(group.sends) - len(group.payload(group.sends)) == 2)  # the next one's head runs ahead
    group.announce(3)
    for done in range(4):
        for works in (group.sends, group.receives):
            until(functools.partial(group.has, works, DEPTH + done if works is group.sends else min(5, DEPTH + done)))
            group.payload(works)[done].done.set()
        for work in group.sends:
            if work.tensor.numel() == HEAD_BYTES:
                work.done.set()
    assert not parcel.done
    assert here.delivered == []
    for works in (group.sends, group.receives):
        group.payload(works)[4].done.set()
    until(lambda: parcel.done and here.delivered == [3])


@pytest.mark.trap(40)
def test_what_has_arrived_is_delivered_before_the_loss_and_parcels_fail(ends: Callable[[int], Ends]) -> None:
    here = ends(1)
    group = here.group
    group.announce(4)
    until(lambda: len(group.payload(group.receives)) == 1)
    parcel = Parcel(b"envelope", here.payload)
    here.link.submit(parcel)
    here.may_deliver.clear()
    group.payload(group.receives)[0].done.set()
    group.broken.set()
    until(lambda: not {"weft-gloo from peer", "weft-gloo to peer"} & {thread.name for thread in threading.enumerate()})
    assert not here.lost
    here.may_deliver.set()
    until(lambda: parcel.done and bool(here.lost))
    assert here.delivered == [4]
    assert isinstance(parcel.error, PeerLostError)
    assert [str(error) for error in here.lost] == [str(parcel.error)]
    late = Parcel(b"late", ())
    here.link.submit(late)
    assert late.error is parcel.error
