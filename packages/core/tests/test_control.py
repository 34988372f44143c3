"""Control connections: in any order of connecting, whole messages in order, losses said once."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from weft.authentication import Key, Secret
from weft.builder import LayoutBuilder
from weft.control import FRAME_LIMIT_BYTES, Control, Hello, Proof
from weft.deadline import Deadline
from weft.errors import PeerLostError
from weft.live import LiveSource
from weft.refit import Refit
from weft.roster import Expect

Heard = list[tuple[str, bytes | PeerLostError]]
KEY = Secret("correct horse battery staple").key("job")


@pytest.fixture(params=[None, KEY], ids=["open", "secret"])
def key(request: pytest.FixtureRequest) -> Key | None:
    """Of all members, unless a test says otherwise."""
    found: Key | None = request.param
    return found


@pytest.fixture
def make(key: Key | None) -> Iterator[Callable[..., Control]]:
    made: list[Control] = []

    def one(identity: str, key: Key | None = key) -> Control:
        made.append(Control(identity, "127.0.0.1", key))
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
def test_who_answers_must_be_who_was_meant(make: Callable[[str], Control], answer: object, key: Key | None) -> None:
    a, heard = make("a"), list[tuple[str, bytes | PeerLostError]]()
    with socket.create_server(("127.0.0.1", 0)) as server:
        a.connect("b", "b", "127.0.0.1", server.getsockname()[1], dials=True)
        connection, _ = server.accept()
        with connection:
            body = msgspec.msgpack.encode(answer)
            connection.sendall(struct.pack("<I", len(body)) + body)
            Deadline.after(60).wait(lambda: bool(heard.extend(a.step()) or heard), "the loss", list)
    assert isinstance(heard[0][1], PeerLostError)
    assert ("another endpoint answers there" if key is None else "does not prove") in str(heard[0][1])


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


OTHER = Secret("incorrect horse battery staple").key("job")


@pytest.mark.parametrize(("called", "caller"), [(KEY, OTHER), (KEY, None), (None, KEY), (OTHER, KEY)])
def test_who_has_another_secret_or_none_is_refused_by_name_and_heard_by_nobody(
    make: Callable[..., Control], called: Key | None, caller: Key | None, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = make("a", caller), make("b", called)
    connect(a, "b", b)
    connect(b, "a", a)
    a.send("b", b"something")
    b.send("a", b"something")
    heard: Heard = []

    def lost() -> bool:
        heard.extend(a.step())
        for _, said in b.step():
            assert isinstance(said, PeerLostError)
        return bool(heard)

    Deadline.after(60).wait(lost, "the loss", list)
    (error,) = [said for _, said in heard]
    assert isinstance(error, PeerLostError)
    assert error.peer == "b"
    assert not a.up("b")
    if called is not None and caller is not None:
        assert "to prove that they know the job's secret" in str(error)
        assert "who says to be a does not prove that it knows the job's secret" in caplog.text


class Impostor:
    """Says over a socket whatever it likes to; what it is told it has read."""

    def __init__(self, victim: Control) -> None:
        self.victim = victim
        self.socket = socket.create_connection(("127.0.0.1", victim.port), timeout=0.002)
        self.got = b""
        self.closed = False

    def say(self, message: object) -> None:
        body = msgspec.msgpack.encode(message)
        self.socket.sendall(struct.pack("<I", len(body)) + body)

    def hear(self) -> Proof | None:
        """What the victim answers; None when it closes the connection."""

        def answered() -> bool:
            assert self.victim.step() == [], "an impostor is heard"
            try:
                found = self.socket.recv(4096)
            except TimeoutError:
                return False
            except ConnectionResetError:
                found = b""
            self.got += found
            self.closed = not found
            return True

        Deadline.after(60).wait(answered, "an answer", list)
        return None if self.closed else msgspec.msgpack.decode(self.got[4:], type=Proof)


@pytest.mark.parametrize("key", [KEY], ids=["secret"])
def test_proofs_are_of_one_connection_one_direction_and_two_ends(make: Callable[..., Control]) -> None:
    victim = make("victim")
    victim.connect("peer", "peer/life", "127.0.0.1", 1, dials=False)
    ends = b"peer/life", b"victim"

    def code(*parts: bytes) -> bytes:
        return KEY.code(*parts)

    challenges = set()
    for answer in (
        lambda asked: Proof(b"mine", b""),
        lambda asked: Proof(b"mine", code(b"caller", *ends, b"an earlier challenge", b"mine")),
        lambda asked: Proof(b"mine", code(b"called", *ends, asked, b"mine")),
        lambda asked: Proof(b"mine", code(b"caller", b"other/life", b"victim", asked, b"mine")),
        lambda asked: Proof(b"mine", code(b"caller", b"peer/life", b"other", asked, b"mine")),
        lambda asked: Proof(b"mine", code(b"caller", *ends, asked, b"other")),
        lambda asked: Proof(b"mine", code(b"caller", *ends, asked, b"mine")[:15]),
        lambda asked: Proof(b"", code(b"caller", *ends, asked, b"")),
        lambda asked: "no proof",
    ):
        impostor = Impostor(victim)
        impostor.say(Hello("peer/life", "victim"))
        challenge = impostor.hear()
        assert challenge is not None
        assert challenge.code == b"", "who is called proves nothing before its caller has"
        challenges.add(challenge.challenge)
        impostor.say(answer(challenge.challenge))
        assert impostor.hear() is None
        assert not victim.up("peer")
        impostor.socket.close()
    assert len(challenges) == 9
    member = make("peer/life")
    member.connect("victim", "victim", "127.0.0.1", victim.port, dials=True)
    Deadline.after(60).wait(lambda: not victim.step() and not member.step() and member.up("victim"), "it", list)
    assert victim.up("peer"), "who has the secret comes in after them"


@pytest.mark.parametrize("key", [KEY], ids=["secret"])
@pytest.mark.parametrize("wrong", ["nothing", "direction", "challenge", "echo"])
def test_who_is_called_must_prove_itself_too(make: Callable[..., Control], wrong: str) -> None:
    a, heard = make("a"), list[tuple[str, bytes | PeerLostError]]()
    with socket.create_server(("127.0.0.1", 0)) as server:
        a.connect("b", "b", "127.0.0.1", server.getsockname()[1], dials=True)
        connection, _ = server.accept()

        def say(message: object) -> None:
            body = msgspec.msgpack.encode(message)
            connection.sendall(struct.pack("<I", len(body)) + body)

        with connection:
            connection.settimeout(0.002)
            say(Proof(b"asked", b""))
            got = bytearray()

            def answered() -> bool:
                heard.extend(a.step())
                try:
                    got.extend(connection.recv(4096))
                except TimeoutError:
                    return False
                return len(got) > 60

            Deadline.after(60).wait(answered, "the caller's proof", list)
            hello_bytes = 4 + int.from_bytes(got[:4], "little")
            answer = msgspec.msgpack.decode(bytes(got[hello_bytes + 4 :]), type=Proof)
            assert KEY.fits(answer.code, b"caller", b"a", b"b", b"asked", answer.challenge)
            codes = {
                "nothing": b"",
                "direction": KEY.code(b"caller", b"a", b"b", b"asked", answer.challenge),
                "challenge": KEY.code(b"called", b"a", b"b", b"asked", b"another"),
                "echo": answer.code,
            }
            say(Proof(b"", codes[wrong]))
            say(Hello("b", "a"))
            Deadline.after(60).wait(lambda: bool(heard.extend(a.step()) or heard), "the loss", list)
    assert "does not prove that it knows the job's secret" in str(heard[0][1])
    assert not a.up("b")


def test_a_refit_gives_its_transport_a_key_of_the_jobs_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Key] = []

    class Told(Exception):
        pass

    class Trusts:
        def trust(self, key: Key) -> None:
            given.append(key)
            raise Told

        def close(self) -> None:
            return None

    monkeypatch.setattr("weft.refit.load", lambda group, name: lambda options: Trusts())
    builder = LayoutBuilder()
    builder.tensor("w", (4,), "float32")
    builder.buffer("w", "float32", 4, group="all")
    builder.shard("w", "w")
    source = LiveSource(builder.build(), {"w": torch.zeros(4)}, lambda: None)
    for job in ("one", "two"):
        refit = Refit(source=source, transport="trusts", store="file:///nowhere", job=job, name="a",
                      expect=Expect(1, 1), secret="correct horse battery staple")  # fmt: skip
        with pytest.raises(Told):
            refit.open()
    one, two = (key.code(b"words") for key in given)
    assert one != two
    assert one == Secret("correct horse battery staple").key("one").derived(b"connections").code(b"words")
