"""What comes from others is bounded, and refers to nothing that is not there."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from weft import content
from weft.builder import LayoutBuilder
from weft.content import get_content, put_content
from weft.deadline import Deadline
from weft.errors import RecordError
from weft.local import LocalHub, factory
from weft.lower import lower
from weft.member import Member, RemoteRegion
from weft.plan import plan
from weft.policy import Policy
from weft.prepare import make_endpoint, transfer_program
from weft.records import decoded, open_record, seal
from weft.rendezvous import EndpointRecord
from weft.roster import Action, Event
from weft.slices import Slice, slice_of
from weft.testing.members import MemoryTarget
from weft.testing.tiny import Tiny

GOOD: dict[str, Any] = {
    "name": "m", "incarnation": 1, "memory_epoch": 0, "address": b"", "regions": (RemoteRegion(0, 64, "cpu"),),
    "source_region": bytes(8), "source_offset": bytes(8), "target_region": b"", "target_offset": b"",
    "fingerprint": "f", "slots": {"o": (0, 64)}, "outgoing_slots": {},
}  # fmt: skip


def word(number: int) -> bytes:
    return np.array([number], "<i8").tobytes()


def test_an_endpoint_that_fits_itself_is_read() -> None:
    record = EndpointRecord(**GOOD)
    assert open_record("endpoint", EndpointRecord, seal("endpoint", record)) == record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_offset": b""}, "different lengths"),
        ({"source_region": bytes(9), "source_offset": bytes(9)}, "different lengths"),
        ({"source_region": word(1)}, "in no region"),
        ({"source_region": word(-1)}, "in no region"),
        ({"source_offset": word(65)}, "in no region"),
        ({"source_offset": word(-1)}, "in no region"),
        ({"target_region": word(3), "target_offset": word(0)}, "in no region"),
        ({"slots": {"o": (1, 0)}}, "in no region"),
        ({"outgoing_slots": {"o": (0, 65)}}, "in no region"),
        ({"regions": (RemoteRegion(0, -1, "cpu"),)}, "no address, or no size"),
        ({"regions": (RemoteRegion(-1, 64, "cpu"),)}, "no address, or no size"),
    ],
    ids=str,
)
def test_an_endpoint_that_points_at_nothing_is_refused(change: dict[str, Any], words: str) -> None:
    fields = [msgspec.to_builtins({**GOOD, **change}[name]) for name in EndpointRecord.__struct_fields__[:-1]]
    for n, name in enumerate(EndpointRecord.__struct_fields__[:-1]):
        if isinstance(GOOD[name], bytes):
            fields[n] = {**GOOD, **change}[name]
    with pytest.raises(RecordError, match=words):
        open_record("endpoint", EndpointRecord, seal("endpoint", fields))


@pytest.mark.parametrize(
    "change", [{"target_region": b"", "target_offset": b""}, {"slots": {}}], ids=["buffer", "slot"]
)
def test_an_endpoint_without_what_the_plan_has_there_is_refused(change: dict[str, Any]) -> None:
    tiny = Tiny()
    held, wanted = tiny.source(0, 1), tiny.target(0, 1)
    source, target = Member("s", held.address, None, None, 0, "h", "h", "cpu"), Member(
        "t", None, wanted.address, "r", 1, "h", "h", "cpu"
    )  # fmt: skip
    layouts = {each.address: each for each in (held, wanted)}
    whole = plan([source], [target], layouts, Policy(direct_run_bytes=1 << 40))
    own = slice_of(whole, "s")
    program = lower(own)
    memory = MemoryTarget("s", held).memory()
    endpoint = make_endpoint(program, (held, memory), None)
    theirs = {
        **GOOD,
        "name": "t",
        "slots": {"s": (0, 0)},
        "target_region": bytes(8 * 99),
        "target_offset": bytes(8 * 99),
    }
    transfer_program(own, program, endpoint, {"t": EndpointRecord(**theirs)}, [source, target])
    with pytest.raises(RecordError, match="endpoint of t lacks buffers or staging slots"):
        transfer_program(own, program, endpoint, {"t": EndpointRecord(**{**theirs, **change})}, [source, target])


def test_content_is_bounded_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, bytes] = {}
    store: Any = SimpleNamespace(get=values.get, set=values.__setitem__)
    address = put_content(store, "p", b"12345678")
    assert get_content(store, "p", address) == b"12345678"
    monkeypatch.setattr(content, "LIMIT_BYTES", 7)
    with pytest.raises(RecordError, match="content under p: expected at most 7 bytes, found 8"):
        get_content(store, "p", address)
    with pytest.raises(RecordError, match="content under p: expected at most 7 bytes, found 8"):
        put_content(store, "p", b"12345678")


def test_an_address_that_is_none_is_a_record_error() -> None:
    end = factory({"hub": LocalHub()})
    end.open(Member("a", None, None, None, 0, "h", "h", "cpu"))
    for address in (b"", b"\xc1", b"\x01", b"\x91" * 100_000):
        with pytest.raises(RecordError, match="address of b is none of transport 'local'"):
            end.connect(Member("b", None, None, None, 0, "h", "h", "cpu"), address, Deadline.after(60))


def made_slice() -> Slice:
    builder = LayoutBuilder()
    builder.tensor("w", (4, 6), "float32")
    builder.buffer("w", "float32", 24, group="g")
    builder.shard("w", "w")
    layout = builder.build()
    ends = Member("s", layout.address, None, None, 0, "h", "h", "cpu"), Member(
        "t", None, layout.address, "r", 1, "h", "h", "cpu"
    )  # fmt: skip
    return slice_of(plan([ends[0]], [ends[1]], {layout.address: layout}), "t")


@pytest.mark.parametrize("change", [{"count": 2**62}, {"count": 1}, {"numbers": (0, -1)}, {"numbers": (0, 2**62)}])
def test_a_slice_that_counts_members_without_end_is_read_or_refused_at_once(change: dict[str, Any]) -> None:
    changed = dataclasses.replace(made_slice(), **change)
    if change == {"count": 2**62}:
        assert Slice.decode(changed.encoded).count == 2**62
    else:
        with pytest.raises(RecordError, match="members without numbers"):
            Slice.decode(changed.encoded)


def test_a_slice_whose_split_is_none_of_its_tensor_is_refused() -> None:
    whole = made_slice()
    for split in (whole.splits * 2**20, whole.splits * 0, whole.splits - 1):
        with pytest.raises(RecordError, match="a split does not divide its tensor"):
            Slice.decode(dataclasses.replace(whole, splits=split).encoded)


def test_nesting_without_end_is_refused_whatever_the_schema() -> None:
    event = msgspec.msgpack.encode(Event(Action.LEAVE, "a", 1))
    longer = b"\x96" + event[1:] + b"\x91" * 200_000
    with pytest.raises(RecordError):
        decoded(Event, longer, "no event")
