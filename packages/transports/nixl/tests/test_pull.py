"""Reads that are given up: nothing of them is delivered, and none writes into memory that is used anew. And waits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from weft.contracts import Bucket, Message, TransferProgram
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError, TransportError
from weft.member import Member, Region, RemoteRegion, Tag
from weft.testing.crew import mirrored, segments
from weft_nixl import NixlOptions, NixlTransport, factory, transport
from weft_nixl.options import backend_parameters

BYTES = 24 << 20
SECONDS = 60.0
POISON = 165
ROWS = segments([(0, 0, 0, 0, BYTES)])


class End:
    """One endpoint with a region; its transport's thread drives it."""

    def __init__(self, name: str, value: int, **options: Any) -> None:
        self.member = Member(name, None, None, None, 0, "here", "here", "cpu")
        self.memory = torch.full((BYTES,), value, dtype=torch.uint8)
        self.transport: NixlTransport = factory(options)  # type: ignore[assignment]
        self.transport.open(self.member)
        self.transport.register(Region(name, self.memory), Deadline.after(SECONDS))

    def connect(self, other: "End") -> None:
        self.transport.connect(other.member, other.transport.address(), Deadline.after(SECONDS))

    def prepare(self, other: "End", *, sends: bool, key: bytes = b"key") -> Any:
        bucket = Bucket(0, other.member.name, ROWS if sends else mirrored(ROWS))
        remote = {other.member.name: (RemoteRegion(other.memory.data_ptr(), BYTES, "cpu"),)}
        program = TransferProgram(
            key, (bucket,) if sends else (), () if sends else (bucket,), (Region("", self.memory),), remote
        )
        return self.transport.prepare(program, Deadline.after(SECONDS))

    def post(self, prepared: Any, version: int) -> Any:
        return self.transport.post(prepared, 0, Tag(version, self.member.name, 0, 0), b"", None)

    @property
    def still(self) -> Any:
        """As long as it is entered, only the test's own calls make progress here."""
        return self.transport._lock

    def reads(self) -> bool:
        """Whether a read is in flight."""
        peers, _ = self.transport._used or pytest.fail("closed")
        return any(lane.flight for lane in peers.lanes())

    def readings(self) -> list[Any]:
        """What was offered and is neither delivered nor dropped."""
        _, mover = self.transport._used or pytest.fail("closed")
        return list(mover._readings.values())  # type: ignore[attr-defined]

    def holds(self, value: int) -> bool:
        return bool((self.memory == value).all())


Pair = tuple[End, End]


def connected(**options: Any) -> Iterator[Pair]:
    """A sender of sevens and a poisoned receiver."""
    sender, receiver = End("sender", 7, **options), End("receiver", POISON, **options)
    sender.connect(receiver)
    receiver.connect(sender)
    for end, other in ((sender, receiver), (receiver, sender)):
        end.transport.signal(other.member.name, Tag(0, end.member.name, 0, 0), b"connected")
    for end in (sender, receiver):
        assert collect(end).note == b"connected"
    yield sender, receiver
    for end in (sender, receiver):
        end.transport.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Over TCP, where a read needs the sender's progress."""
    yield from connected(direction="pull", ucx_settings={"TLS": "tcp"})


def until(ready: Callable[[], object]) -> None:
    Deadline.after(SECONDS).wait(lambda: bool(ready()), "a state of the test", list)


def collect(end: End) -> Message:
    found: list[Message] = []
    until(lambda: found.extend(end.transport.poll()) or found)
    (message,) = found
    return message


def arrives_anew(sender: End, receiver: End, sends: Any, value: int) -> None:
    """Posted again, the bucket comes as it is now."""
    sender.memory.fill_(value)
    receiver.memory.fill_(POISON)
    work = sender.post(sends, 2)
    assert collect(receiver).tag.version == 2
    assert receiver.holds(value)
    until(work.poll)


def test_the_directions_of_all_members_are_one() -> None:
    pushes, pulls = End("one", 0, direction="push"), End("two", 0, direction="pull")
    try:
        with pytest.raises(ConfigError, match=r"direction is 'push' at one, 'pull' at two"):
            pushes.connect(pulls)
        with pytest.raises(ConfigError, match=r"direction is 'pull' at two, 'push' at one"):
            pulls.connect(pushes)
    finally:
        pushes.transport.close()
        pulls.transport.close()


def test_reads_need_messages_in_order() -> None:
    with pytest.raises(ConfigError, match=r"'pull', which needs num_workers=1, not 2"):
        backend_parameters(NixlOptions(direction="pull", num_workers=2))
    assert backend_parameters(NixlOptions(num_workers=2))["UCX"]["num_workers"] == "2"


@pytest.mark.trap(65)
def test_nothing_is_delivered_of_a_post_that_is_cancelled_while_it_is_read(pair: Pair) -> None:
    sender, receiver = pair
    sends, _ = sender.prepare(receiver, sends=True), receiver.prepare(sender, sends=False)
    with sender.still:
        work = sender.post(sends, 1)
        until(receiver.reads)
        work.cancel()
        assert work.poll()
        sender.memory.fill_(9)
    until(lambda: not receiver.readings())
    assert not receiver.transport.poll()
    arrives_anew(sender, receiver, sends, 11)


@pytest.mark.trap(65)
def test_nothing_is_delivered_of_a_post_that_is_cancelled_when_it_has_been_read(pair: Pair) -> None:
    """The receiver has every byte before the sender's cancel, of which it cannot know yet."""
    sender, receiver = pair
    sends, _ = sender.prepare(receiver, sends=True), receiver.prepare(sender, sends=False)
    agent: Any = sender.transport._agent
    receive, held = agent.get_new_notifs, []
    with sender.still:  # makes progress from now on, but hears nothing
        agent.get_new_notifs = lambda: held.append(receive()) or {}
    work = sender.post(sends, 1)
    until(lambda: any(reading.complete for reading in receiver.readings()))
    with sender.still:
        work.cancel()
        agent.get_new_notifs = lambda: held.pop(0) if held else receive()
    until(lambda: not receiver.readings())
    assert not receiver.transport.poll()
    arrives_anew(sender, receiver, sends, 11)


@pytest.mark.trap(61, 67)
@pytest.mark.parametrize("leaves", [False, True])
def test_a_released_program_is_not_read_into_any_more(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """While a read is in flight, and does not end because the sender hangs, `release` does not say that it has."""
    sender, receiver = pair
    sends, receives = sender.prepare(receiver, sends=True), receiver.prepare(sender, sends=False)
    monkeypatch.setattr(transport, "_RELEASE_SECONDS", 0.2)
    with sender.still:
        work = sender.post(sends, 1)
        until(receiver.reads)
        if leaves:
            receiver.transport.disconnect("sender")
        with pytest.raises(DeadlineError, match="late: sender"):
            receiver.transport.release(receives)
    monkeypatch.setattr(transport, "_RELEASE_SECONDS", SECONDS)
    receiver.transport.release(receives)
    receiver.memory.fill_(POISON)
    if leaves:
        with pytest.raises(TransportError, match="receiver has not read it: its receiver has disconnected"):
            until(work.poll)
    else:
        until(work.poll)
        until(lambda: not receiver.readings())
    assert not receiver.transport.poll()
    assert receiver.holds(POISON)


@pytest.mark.trap(31, 40)
def test_close_does_not_wait_for_a_sender_that_hangs(pair: Pair) -> None:
    """Without an agent nothing is written any more."""
    sender, receiver = pair
    sends, _ = sender.prepare(receiver, sends=True), receiver.prepare(sender, sends=False)
    with sender.still:
        work = sender.post(sends, 1)
        until(receiver.reads)
        receiver.transport.close()
        receiver.memory.fill_(POISON)
    with pytest.raises(TransportError, match="receiver"):
        until(work.poll)
    assert receiver.holds(POISON)


def test_a_bucket_waits_for_its_program_and_not_for_one_that_was_released(pair: Pair) -> None:
    sender, receiver = pair
    sends = sender.prepare(receiver, sends=True)
    work = sender.post(sends, 1)
    until(receiver.readings)
    receives = receiver.prepare(sender, sends=False)
    assert collect(receiver).tag.version == 1
    assert receiver.holds(7)
    until(work.poll)
    receiver.transport.release(receives)
    receiver.memory.fill_(POISON)
    again = sender.post(sends, 2)
    until(again.poll)
    assert not receiver.transport.poll()
    assert receiver.holds(POISON)


def test_a_bucket_that_is_none_of_the_receivers_is_said_at_the_sender(pair: Pair) -> None:
    sender, receiver = pair
    sends = sender.prepare(receiver, sends=True)
    receiver.prepare(sender, sends=True)
    work = sender.post(sends, 1)
    with pytest.raises(TransportError, match=r"moving bucket 0 .*: receiver has not read it: bucket 0 is none of its"):
        until(work.poll)


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_wait_ends_when_a_bucket_has_left_and_when_one_has_arrived(direction: str) -> None:
    """The transport's thread may see it first: then the wait does not begin."""
    for sender, receiver in connected(direction=direction, ucx_settings={"TLS": "tcp"}):
        sends, _ = sender.prepare(receiver, sends=True), receiver.prepare(sender, sends=False)
        work, limit = sender.post(sends, 1), Deadline.after(SECONDS)
        while not work.poll():
            sender.transport.wait(2 * SECONDS)
        while not (found := receiver.transport.poll()):
            receiver.transport.wait(2 * SECONDS)
        assert not limit.expired()
        assert [message.bucket for message in found] == [0]
