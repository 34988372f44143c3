"""Control connections: in any order of connecting, whole messages in order, losses said once."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import msgspec
import pytest

from weft.control import FRAME_LIMIT_BYTES, Control, Hello
from weft.deadline import Deadline
from weft.errors import PeerLostError

Heard = list[tuple[str, bytes | PeerLostError]]


@pytest.fixture
def make() -> Iterator[Callable[[str], Control]]:
    made: list[Control] = []

    def one(identity: str) -> Control:
        made.append(Control(identity, "127.0.0.1"))
        return made[-1]

    yield one
    for each in made:
        each.close()


def connect(one: Control, name: str, other: Control) -> None:
    """Connect `one` to `other`, whose member is called `name`."""
    one.connect(name, other.identity, "127.0.0.1", other.port, dials=one.identity < other.identity)


@pytest.mark.parametrize("first", ["a", "b"])
def test_either_side_may_come_first_and_what_it_said_before_is_heard(
    make: Callable[[str], Control], first: str
) -> None:
    a, b = make("a"), make("b")
    one, other, name, peer = (a, b, "a", "b") if first == "a" else (b, a, "b", "a")
    connect(one, peer, other)
    one.send(peer, b"early")
    for _ in range(20):
        assert one.step() == other.step() == []
    assert not one.up(peer)
    connect(other, name, one)
    heard: Heard = []
    Deadline.after(60).wait(lambda: bool(heard.extend(other.step()) or one.step() or heard), "it", list)
    assert heard == [(name, b"early")]
    assert one.up(peer)
    assert other.up(name)


def test_messages_of_every_size_arrive_whole_and_in_order_both_ways(make: Callable[[str], Control]) -> None:
    a, b = make("a"), make("b")
    connect(a, "b", b)
    connect(b, "a", a)
    messages = [bytes([i]) * size for i, size in enumerate([0, 1, 65536, 3, FRAME_LIMIT_BYTES, 7] * 3)]
    for message in messages:
        a.send("b", message)
        b.send("a", message)
    got: dict[str, list[bytes | PeerLostError]] = {"a": [], "b": []}

    def complete() -> bool:
        for one in (a, b):
            for peer, message in one.step():
                got[peer].append(message)
        return all(len(each) == len(messages) for each in got.values())

    Deadline.after(60).wait(complete, "messages", list)
    assert got == {"a": messages, "b": messages}


def test_who_finishes_has_been_heard_when_its_peers_have_closed_too(make: Callable[[str], Control]) -> None:
    a, b = make("a"), make("b")
    connect(a, "b", b)
    connect(b, "a", a)
    Deadline.after(60).wait(lambda: bool(a.step() or b.step()) or (a.up("b") and b.up("a")), "it", list)
    messages = [bytes([i]) * 60_000 for i in range(50)]
    for message in messages:
        a.send("b", message)
        b.send("a", b"not looked at")
    heard: Heard = []
    assert not a.finish()

    def finished() -> bool:
        heard.extend(b.step())
        a.step()
        return a.finish()

    Deadline.after(60).wait(finished, "b", list)
    assert [message for _, message in heard[:-1]] == messages
    assert isinstance(heard[-1][1], PeerLostError)


@pytest.mark.trap(40)
def test_a_loss_is_said_once_and_after_what_was_said_before_it(make: Callable[[str], Control]) -> None:
    a, b = make("a"), make("b")
    connect(a, "b", b)
    connect(b, "a", a)
    Deadline.after(60).wait(lambda: bool(a.step() or b.step()) or (a.up("b") and b.up("a")), "it", list)
    b.send("a", b"last")
    b.close()
    heard: Heard = []
    Deadline.after(60).wait(lambda: bool(heard.extend(a.step())) or len(heard) >= 2, "the loss", list)
    for _ in range(20):
        heard += a.step()
    assert [peer for peer, _ in heard] == ["b", "b"]
    assert heard[0][1] == b"last"
    assert isinstance(heard[1][1], PeerLostError)
    assert not a.up("b")
    a.send("b", b"to nobody")


@pytest.mark.trap(40, 49)
def test_nobody_there_is_a_loss(make: Callable[[str], Control]) -> None:
    a, b = make("a"), make("b")
    port = b.port
    b.close()
    a.connect("b", "b", "127.0.0.1", port, dials=True)
    heard: Heard = []
    Deadline.after(60).wait(lambda: bool(heard.extend(a.step()) or heard), "the loss", list)
    assert isinstance(heard[0][1], PeerLostError)


@pytest.mark.trap(64)
def test_another_life_of_the_peer_is_not_taken_for_it(make: Callable[[str], Control]) -> None:
    a, b = make("a"), make("b/second life")
    a.connect("b", "b/first life", "127.0.0.1", b.port, dials=True)
    connect(b, "a", a)
    heard: Heard = []

    def lost() -> bool:
        heard.extend(a.step())
        assert b.step() == [], "took a connection that was meant for another"
        return bool(heard)

    Deadline.after(60).wait(lost, "the loss", list)
    assert isinstance(heard[0][1], PeerLostError)
    for _ in range(20):
        assert b.step() == []


@pytest.mark.trap(64)
@pytest.mark.parametrize("answer", [Hello("another", "a"), Hello("b", "another"), "no hello"])
def test_who_answers_must_be_who_was_meant(make: Callable[[str], Control], answer: object) -> None:
    a, heard = make("a"), list[tuple[str, bytes | PeerLostError]]()
    with socket.create_server(("127.0.0.1", 0)) as server:
        a.connect("b", "b", "127.0.0.1", server.getsockname()[1], dials=True)
        connection, _ = server.accept()
        with connection:
            body = msgspec.msgpack.encode(answer)
            connection.sendall(struct.pack("<I", len(body)) + body)
            Deadline.after(60).wait(lambda: bool(heard.extend(a.step()) or heard), "the loss", list)
    assert isinstance(heard[0][1], PeerLostError)
    assert "another endpoint answers there" in str(heard[0][1])


def test_strangers_are_turned_away(make: Callable[[str], Control]) -> None:
    a = make("a")
    for said in (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 5) + b"hello", struct.pack("<I", 0)):
        with socket.create_connection(("127.0.0.1", a.port), timeout=60) as stranger:
            stranger.sendall(said)
            stranger.settimeout(0.002)
            answer: list[bytes] = []

            def closed(stranger: socket.socket = stranger, answer: list[bytes] = answer) -> bool:
                assert a.step() == []
                try:
                    answer.append(stranger.recv(1))
                except TimeoutError:
                    return False
                except ConnectionResetError:
                    answer.append(b"")
                return True

            Deadline.after(60).wait(closed, "the end of the connection", list)
            assert answer == [b""]
