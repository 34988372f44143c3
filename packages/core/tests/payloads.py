"""One payload of every kind that weft writes for others to read, and how each is read.

python -m tests.payloads, in packages/core: writes those of now to `golden/<date>.json`, beside those of before. weft
must read all of them.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from weft.authentication import Secret
from weft.control import Hello
from weft.endpoint import Envelope
from weft.facts import Facts
from weft.fleet.roll import Announced, Roll
from weft.formats import Acceptance, Format
from weft.layout import Layout
from weft.leaders import OfferRecord, OutcomeRecord
from weft.member import Member, RemoteRegion, Tag
from weft.orchestration.records import Doing, Presence, ReplicaState, Request, What
from weft.passages import Arrived, Ask, Go, Grant, Invitation, Said, Signal, Withdrawn
from weft.plan import plan
from weft.policy import Policy
from weft.publication.holders import Chosen, Holder, Kept, Wanted
from weft.publication.publisher import Coming
from weft.publication.readers import Turn
from weft.records import decoded, open_record, seal
from weft.rendezvous import EndpointRecord
from weft.roster import Action, Event, MemberRecord
from weft.slices import Slice, slice_of
from weft.testing.tiny import Tiny
from weft.wire import Notice

FOLDER = Path(__file__).parent / "golden"
KEY = Secret("the secret of all golden payloads").key("golden")
PLACE = "weft/golden/somewhere"


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes, and what reads them."""

    data: bytes
    read: Callable[[bytes], object]


def payloads() -> dict[str, Payload]:
    """By name."""
    member, layout, part = _made()
    facts = Facts("0.1.0", "3.11.7", "2.13.0", "13.0", "sm_90", {"megatron-core": "0.16.1"})
    join = Event(Action.JOIN, "trainer/0", 2, record=MemberRecord(member, b"\x80", "0.1.0", 3, 1, 1, facts))
    tag = Tag(7, "trainer/0", 2, 1)
    envelope = Envelope(tag, 3, b"note", b"k" * 32)
    found = {
        "layout": Payload(layout.encoded, Layout.decode),
        "layout with formats": Payload(_with_formats(layout).encoded, Layout.decode),
        "slice": Payload(part.encoded, Slice.decode),
        "notice": _plain(Notice("replica-outcome", "rollout", "words", (1, 2, 3)), Notice),
        "envelope of a bucket": _plain(envelope, Envelope),
        "envelope of a signal": _plain(Envelope(tag, None, b"note"), Envelope),
        "hello": _plain(Hello("trainer/0#1/abc", "rollout/0#1/def"), Hello),
    }
    for said in (
        Signal(envelope), Invitation(b"body"), Ask(1, [envelope]), Grant(1), Go(1), Withdrawn(1), Arrived(1, 2),
    ):  # fmt: skip
        found[f"passage {type(said).__name__.lower()}"] = _plain(said, Said)
    for kind, name, made in (
        ("rendezvous", "join", join),
        ("rendezvous", "fail", Event(Action.FAIL, "trainer/0", 2, "why")),
        ("rendezvous", "late", Event(Action.LATE, "trainer/0", 2, "why")),
        ("rendezvous", "leave", Event(Action.LEAVE, "trainer/0", 2)),
        ("endpoint", "of a source", _endpoint()),
        ("slice", "of a plan", part.encoded),
        ("offer", "of the sources", OfferRecord(7)),
        ("outcome", "aborted", OutcomeRecord(7, "rollout", False, "why")),
        ("announced", "of a member", Announced("rollout", "rollout/0", 2, 5)),
        ("roll", "of a fleet", Roll(3, {"rollout": 5}, (b"n" * 16,))),
        ("holder", "of a job", _holder()),
        ("news", "of a job", 7),
        ("wants", "of a member", Wanted("a" * 64, b"n" * 8)),
        ("layout", "of a member", "a" * 64),
        ("chosen", "of a replica", Chosen(5, _holder(), True, (b"n" * 8, b"m" * 8), 6, 7)),
        ("chosen", "of nobody", Chosen(6, Holder("", "", 0, -1), True, (b"n" * 8,), 6, 7, ("why",))),
        ("coming", "of a holder", Coming(3, 7, 6)),
        ("turn", "of a holder", Turn(3, 7, 4)),
        ("hello", "of a source", b"n" * 16),
        ("opened", "of a fleet", 3),
        ("at", "of a version", 3),
        ("heard", "of a source", 3),
        ("orchestrator", "of a job", Presence("node7", b"n" * 16, ("rollout",))),
        ("request", "to pause", Request(5, What.PAUSE, 60.0, "wait")),
        ("request", "to resume", Request(6, What.RESUME, 60.0, version=7, forget=True)),
        ("request", "to refuse", Request(7, What.REFUSE, 60.0, reason="why")),
        ("state", "of a replica", ReplicaState(7, Doing.REFUSING, 6, "why", "what failed")),
    ):
        found[f"{kind} record {name}"] = _record(kind, made, None)
        found[f"{kind} record {name}, with a secret"] = _record(kind, made, PLACE)
    return found


def values_of(found: object) -> Any:
    """A decoded value in words of JSON, structs by the names of their fields."""
    match found:
        case msgspec.Struct():
            return {name: values_of(getattr(found, name)) for name in found.__struct_fields__}
        case bytes():
            return found.hex()
        case enum.Enum():
            return found.value
        case np.ndarray():
            return found.tolist()
        case Mapping():
            return {str(key): values_of(value) for key, value in found.items()}
        case list() | tuple():
            return [values_of(value) for value in found]
    if dataclasses.is_dataclass(found):
        return {field.name: values_of(getattr(found, field.name)) for field in dataclasses.fields(found)}
    return found


def _plain(made: object, kind: Any) -> Payload:
    return Payload(msgspec.msgpack.encode(made), lambda data: decoded(kind, data, "not what it should be"))


def _record(kind: str, made: object, place: str | None) -> Payload:
    options: dict[str, Any] = {} if place is None else {"place": place, "key": KEY}
    return Payload(seal(kind, made, **options), lambda data: open_record(kind, type(made), data, **options))


def _made() -> tuple[Member, Layout, Slice]:
    """A source, the layout of a target, the slice of another target."""
    tiny = Tiny(layers=1, hidden=4, inner=6)
    held, wanted = tiny.source(0, 1), tiny.target(0, 1, scratch_slots=2)
    source = Member("trainer/0", held.address, None, None, 0, "h", "d", "cpu", ("eth0",), 2, 1)
    target = Member("rollout/0", None, wanted.address, "rollout", 1, "h", "d", "cpu")
    whole = plan([source], [target], {each.address: each for each in (held, wanted)}, Policy(relay="never"))
    return source, wanted, slice_of(whole, "rollout/0")


def _with_formats(layout: Layout) -> Layout:
    first, second, *_ = [tensor.name for tensor in layout.tensors]
    return dataclasses.replace(
        layout, formats={first: Format("packed", {"isa": "avx512"})}, extra={second: {"note": "kept"}},
        accepts=(Acceptance("packed", {"isa": ("avx2", "avx512"), "block": ()}),),
    )  # fmt: skip


def _holder() -> Holder:
    return Holder(
        "trainer", "job/from/trainer", 2, 7, "d" * 32, "h", "d", True, 3, "a" * 64, Facts("0.1.0"), "e" * 32,
        (Kept(6, "job/from/trainer+1", "f" * 32, "e" * 32),),
    )  # fmt: skip


def _endpoint() -> EndpointRecord:
    return EndpointRecord(
        "trainer/0", 2, 1, b"address", (RemoteRegion(1 << 40, 64, "cuda:3"),), bytes(8), bytes(8), b"", b"",
        "fingerprint", {"rollout/0": (0, 32)}, {"rollout/0": (0, 48)}, b"n" * 16,
    )  # fmt: skip


if __name__ == "__main__":
    written = {
        name: {"bytes": each.data.hex(), "value": values_of(each.read(each.data))} for name, each in payloads().items()
    }
    day = str(datetime.datetime.now(datetime.UTC).date())
    names = itertools.chain([day], (f"{day}-{n}" for n in itertools.count(2)))
    file = next(file for file in (FOLDER / f"{name}.json" for name in names) if not file.exists())
    file.write_text(json.dumps(written, indent=1) + "\n")
    print(file)
