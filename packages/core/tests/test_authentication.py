"""What nobody without the job's secret can make a member believe, and where the secret itself never shows."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from weft.authentication import Guard, Key, Secret
from weft.contracts import Message, Store
from weft.deadline import Deadline
from weft.errors import ConfigError, PeerLostError, RecordError, RendezvousError, WeftError
from weft.job_store import JobStore
from weft.local import LocalHub, factory
from weft.member import Member, Tag
from weft.rendezvous import Rendezvous
from weft.roster import Expect
from weft.store_server import serve_store
from weft.stores import open_store
from weft.testing.faults import FaultyTransport, Script
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny
from weft.wire import Notice, Wire

from .acts import serves, trains
from .test_rendezvous import TEAM, Person, endpoint, make_layout

WORDS = "correct horse battery staple"
SECRET, OTHER = Secret(WORDS), Secret("another one of the same length")
JOBS = count()
TAG = Tag(3, "trainer/0", 1, 0)


def test_a_secret_shows_nowhere_but_reaches_other_processes() -> None:
    key = SECRET.key("job")
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", repr({"secret": SECRET}), repr(key), str(key)):
        assert "horse" not in shown
    assert copy.deepcopy(SECRET) == SECRET == Secret(WORDS.encode())
    assert {SECRET: 1}[Secret(WORDS)] == 1
    assert SECRET != OTHER


def test_a_secret_that_can_be_guessed_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match=r"has 15 bytes, expected at least 16: .*openssl rand") as error:
        Secret("fifteen letters")
    assert "fifteen" not in str(error.value)


def test_a_file_holds_the_secret_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"  {WORDS}\n")
    assert Secret.read(file) == SECRET
    file.write_bytes(b"x" * 65_537)
    with pytest.raises(ConfigError, match="over 65536 bytes"):
        Secret.read(file)
    with pytest.raises(ConfigError, match="nowhere cannot be read"):
        Secret.read(tmp_path / "nowhere")


def test_programs_that_others_start_find_it_in_their_environment(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(WORDS)
    assert Secret.of_environment({}) is None
    assert (
        Secret.of_environment({"WEFT_SECRET": WORDS})
        == Secret.of_environment({"WEFT_SECRET_FILE": str(file)})
        == SECRET
    )
    with pytest.raises(ConfigError, match="both set"):
        Secret.of_environment({"WEFT_SECRET": WORDS, "WEFT_SECRET_FILE": str(file)})
    with pytest.raises(ConfigError, match="has 0 bytes"):
        Secret.of_environment({"WEFT_SECRET": ""})


def test_codes_depend_on_the_secret_the_job_the_purpose_and_on_where_a_part_ends() -> None:
    keys = [SECRET.key("job"), SECRET.key("job2"), OTHER.key("job"), SECRET.key("job").derived(b"record")]
    codes = [key.code(*parts) for key in keys for parts in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""))]
    assert len(set(codes)) == len(codes)
    assert {len(code) for code in codes} == {32}
    assert Key(b"k" * 32).code(b"what do ya want") == Key(b"k" * 32).code(b"what do ya want")


def test_a_code_of_no_length_fits_nothing() -> None:
    key = SECRET.key("job")
    right = key.code(b"part")
    assert key.fits(right, b"part")
    assert key.fits(right[:16], b"part")
    assert not any(key.fits(right[:n], b"part") for n in range(16))
    assert not key.fits(right + b"!", b"part")


class Pair:
    """Two lives that know each other."""

    def __init__(self) -> None:
        self.a, self.b = (Guard(SECRET.key("job"), name) for name in ("trainer/0", "rollout/0"))
        self.a.admit("rollout/0", self.b.nonce)
        self.b.admit("trainer/0", self.a.nonce)


def test_a_signal_is_believed_once_and_in_the_order_of_its_number() -> None:
    pair = Pair()
    first, second = (pair.a.signal("rollout/0", TAG, body) for body in (b"one", b"two"))
    assert pair.b.heard_signal("trainer/0", TAG, first) == b"one"
    assert pair.b.heard_signal("trainer/0", TAG, first) is None
    assert pair.b.heard_signal("trainer/0", TAG, second) == b"two"
    assert pair.b.heard_signal("trainer/0", TAG, first) is None


def test_nothing_about_a_signal_can_be_changed() -> None:
    said = Pair().a.signal("rollout/0", TAG, b"commit")
    for at in range(len(said)):
        pair = Pair()
        said = pair.a.signal("rollout/0", TAG, b"commit")
        changed = said[:at] + bytes([said[at] ^ 1]) + said[at + 1 :]
        assert pair.b.heard_signal("trainer/0", TAG, changed) is None
        assert pair.b.heard_signal("trainer/0", TAG, said[:at]) is None
        assert pair.b.heard_signal("trainer/0", TAG, said) == b"commit"


def test_what_was_said_to_somebody_else_elsewhere_or_in_another_life_is_not_believed() -> None:
    pair, stranger = Pair(), Guard(OTHER.key("job"), "trainer/0")
    stranger.admit("rollout/0", pair.b.nonce)
    said = pair.a.signal("rollout/0", TAG, b"commit")
    assert pair.a.heard_signal("rollout/0", TAG, said) is None  # back to who said it
    assert Pair().b.heard_signal("trainer/0", TAG, said) is None  # in another life
    assert pair.b.heard_signal("trainer/1", TAG, said) is None  # in another name
    assert pair.b.heard_signal("trainer/0", msgspec.structs.replace(TAG, version=4), said) is None
    assert pair.b.heard_signal("trainer/0", TAG, stranger.signal("rollout/0", TAG, b"commit")) is None
    assert pair.b.heard_note("trainer/0", TAG, 0, said) is None  # as a note


def test_a_note_is_that_of_one_bucket_of_one_version() -> None:
    pair = Pair()
    said = pair.a.note("rollout/0", TAG, 7, b"digest")
    assert pair.b.heard_note("trainer/0", TAG, 7, said) == b"digest"
    assert pair.b.heard_note("trainer/0", TAG, 8, said) is None
    assert pair.b.heard_note("trainer/0", msgspec.structs.replace(TAG, version=4), 7, said) is None
    assert pair.b.heard_note("trainer/0", TAG, 7, b"digest") is None
    assert pair.b.heard_note("trainer/0", TAG, 7, said) is None  # again
    pair.b.forget(4)
    assert not pair.b._by["trainer/0"].buckets
    with pytest.raises(PeerLostError):
        pair.a.note("nobody", TAG, 7, b"digest")
    with pytest.raises(ConfigError, match="rollout/1 has no nonce"):
        pair.a.admit("rollout/1", b"")


def member(name: str) -> Member:
    return Member(name, None, None, None, 0, "h", "h", "cpu", incarnation=1)


def test_a_wire_drops_what_its_guard_does_not_recognize_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pair, hub = Pair(), LocalHub()
    people = [member("trainer/0"), member("rollout/0")]
    ends = [factory({"hub": hub}) for _ in people]
    for end, person in zip(ends, people, strict=True):
        end.open(person)
    ends[0].connect(people[1], ends[1].address(), Deadline.after(60))
    ends[1].connect(people[0], ends[0].address(), Deadline.after(60))
    sends, hears = Wire(ends[0], people[0], people, pair.a), Wire(ends[1], people[1], people, pair.b)
    sends.tell("rollout/0", 3, Notice("offer", numbers=(1,)))
    ends[0].signal("rollout/0", TAG, msgspec.msgpack.encode(Notice("commit", numbers=(1, 2))))
    hears.pump()
    assert hears.take(3, "offer", "commit") == [("trainer/0", Notice("offer", numbers=(1,)))]
    assert hears.dropped == 1
    assert "a signal of version 3 in the name of trainer/0 is not from it, or old: dropped" in caplog.text
    sends.tell("stranger", 3, Notice("offer"))
    assert [error.peer for error in sends.lost(["stranger"])] == ["stranger"]


class Intruder(Script):
    """Says, in the name of every peer that says anything, what would do harm, and says everything again."""

    def __init__(self) -> None:
        self.forged = 0
        self._heard: list[Message] = []

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        made = [lie for message in messages for lie in self._lies(message)]
        again = list(self._heard)
        self._heard += messages
        self.forged += len(made) + len(again)
        return [*made, *again, *messages]

    def _lies(self, message: Message) -> Sequence[Message]:
        tag = message.tag
        later = msgspec.structs.replace(tag, version=tag.version + 1)
        notices = [Notice(kind, "r0", "a lie", (1, 2)) for kind in ("abort", "withdraw", "commit", "outcome", "failed")]
        said = [msgspec.msgpack.encode(notice) for notice in notices]
        lies = [Message(message.peer, each, None, bytes(24) + lie) for each in (tag, later) for lie in said]
        lies += [Message(message.peer, tag, None, lie) for lie in said]
        lies += [Message(message.peer, later, None, message.note)] if message.bucket is None else []
        lies += [Message(message.peer, tag, bucket, bytes(16) + b"0" * 32) for bucket in range(3)]
        return lies


def refitted(store_url: str, script: Script | None, secret: Secret | None) -> dict[str, Any]:
    """Two versions from one source to a replica of two, everybody under the script."""
    tiny = Tiny()
    weights = [tiny.tensors(seed) for seed in range(2)]
    source = MemorySource("trainer/0", tiny.source(0, 1))
    parts = [Part(source.name, trains(source, weights), source=source, script=script)]
    for rank in range(2):
        target = MemoryTarget(f"r0/{rank}", tiny.target(rank, 2))
        act = serves(target, [tiny.expected(rank, 2, each) for each in weights])
        parts.append(Part(target.name, act, target=target, replica="r0", replica_size=2, script=script))
    return Job(store_url, Expect(1, 1), name=f"guarded{next(JOBS)}", secret=secret).run(parts)


@pytest.mark.trap(46, 64)
@pytest.mark.usefixtures("faulty")
def test_who_speaks_in_the_names_of_members_changes_nothing(store_url: str) -> None:
    intruder = Intruder()
    results = refitted(store_url, intruder, SECRET)
    all_succeeded(results)
    assert intruder.forged > 100


@pytest.mark.usefixtures("faulty")
def test_the_same_lies_are_believed_where_there_is_no_secret(store_url: str) -> None:
    assert any(isinstance(result, WeftError) for result in refitted(store_url, Intruder(), None).values())


@pytest.fixture
def open_one() -> Iterator[Callable[[], Store]]:
    with serve_store() as server, contextlib.ExitStack() as stack:

        def open_another() -> Store:
            store = open_store(server.url, Deadline.after(20.0))
            stack.callback(store.close)
            return store

        yield open_another


def people(open_one: Callable[[], Store], secrets: Sequence[Secret | None], **more: Any) -> list[Person]:
    return [
        Person(open_one(), name, expect=Expect(2, 1), secret=secret, seconds=20.0, **more)
        for name, secret in zip(TEAM, secrets, strict=True)
    ]


def met(team: Sequence[Person]) -> list[Any]:
    """What each of them ends with, met or refused."""

    def meet(person: Person) -> Any:
        try:
            return person.meet()
        except WeftError as error:
            person.rendezvous.fail(person.name, str(error))
            return error

    with ThreadPoolExecutor(len(team)) as pool:
        return list(pool.map(meet, team))


def test_members_of_one_secret_meet(open_one: Callable[[], Store]) -> None:
    assert met(people(open_one, [SECRET] * 4)) == [[(name, 1) for name in TEAM]] * 4


@pytest.mark.parametrize(
    ("odd", "words"), [(OTHER, "members' secrets differ"), (None, "has no secret|the job has a secret")]
)
def test_members_of_different_secrets_do_not_meet_and_say_so(
    open_one: Callable[[], Store], odd: Secret | None, words: str
) -> None:
    for result in met(people(open_one, [SECRET, SECRET, odd, SECRET])):
        assert isinstance(result, RecordError | RendezvousError)
    (first, *_), (stranger, *_) = people(open_one, [SECRET] * 4, job="b"), people(open_one, [odd] * 4, job="b")
    first.announce()
    with pytest.raises(RecordError, match=f"weft/b/log/1 of job 'b': .*({words})"):
        stranger.names()


def test_a_record_that_was_moved_to_another_key_is_refused(open_one: Callable[[], Store]) -> None:
    team = people(open_one, [SECRET] * 4)
    met(team)
    store = open_one()
    store.set("weft/job/endpoint/trainer/1/1", store.get("weft/job/endpoint/trainer/0/1") or b"")
    with pytest.raises(RecordError, match=r"weft/job/endpoint/trainer/1/1 of job 'job': .* code is wrong"):
        team[0].rendezvous.endpoints(TEAM)


def test_an_endpoint_or_a_slice_that_a_stranger_wrote_is_refused(open_one: Callable[[], Store]) -> None:
    team = people(open_one, [SECRET] * 4)
    met(team)
    store = open_one()
    JobStore(store, "job").put("endpoint", "weft/job/endpoint/trainer/1/1", endpoint("trainer/1", 1))
    with pytest.raises(RecordError, match="no authentication code"):
        team[0].rendezvous.endpoints(TEAM)
    Rendezvous(store, "job", Expect(2, 1), Deadline.after(20.0), OTHER).publish_slices("plan", [("trainer/0", b"s")])
    with pytest.raises(RecordError, match="slice record: its authentication code is wrong"):
        team[2].rendezvous.slice("plan", "trainer/0")


def test_an_old_entry_of_the_log_cannot_be_appended_again(open_one: Callable[[], Store]) -> None:
    team = people(open_one, [SECRET] * 4)
    met(team)
    store = open_one()
    store.set(f"weft/job/log/{store.add('weft/job/entries', 1)}", store.get("weft/job/log/1") or b"")
    with pytest.raises(RecordError, match=r"weft/job/log/5 of job 'job': .* code is wrong"):
        team[0].names()


def test_layouts_need_no_code_because_their_addresses_are_in_records(open_one: Callable[[], Store]) -> None:
    team = people(open_one, [SECRET] * 4)
    met(team)
    address = make_layout().address
    open_one().set(f"weft/job/layout/{address}/bytes", make_layout(rows=8).encoded)
    with pytest.raises(RecordError, match=f"content {address} .* with SHA-256"):
        team[0].rendezvous.layout(address)


def test_the_secret_is_in_no_record_message_or_log(
    open_one: Callable[[], Store], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    results = met(people(open_one, [SECRET, SECRET, OTHER, None]))
    store = open_one()
    values = [store.get(key) or b"" for key in store.keys("weft/")]
    shown = repr(results).encode() + caplog.text.encode() + b"".join(values)
    assert len(values) > 4
    assert b"horse" not in shown
    assert b"of the same length" not in shown
