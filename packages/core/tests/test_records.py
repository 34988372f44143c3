"""Records either open as what they were sealed as, or are refused with a `RecordError`."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.authentication import Secret
from weft.errors import RecordError
from weft.records import DEFAULT_LIMIT_BYTES, LIMIT_BYTES, MAGIC, open_record, seal


class Old(msgspec.Struct, array_like=True, frozen=True):
    name: str
    sizes: dict[str, int]


class New(msgspec.Struct, array_like=True, frozen=True):
    name: str
    sizes: dict[str, int]
    extra: tuple[str, ...] = ("default",)


SAMPLE = New("trainer/0", {"a": 1, "b": 2}, ("x", "y"))
SECRET = Secret(b"a secret of sixteen bytes and more")
KEY = SECRET.key("job")


def test_a_record_opens_as_what_was_sealed() -> None:
    assert open_record("sample", New, seal("sample", SAMPLE)) == SAMPLE


def test_neighbouring_versions_read_each_other() -> None:
    assert open_record("sample", Old, seal("sample", SAMPLE)) == Old("trainer/0", {"a": 1, "b": 2})
    assert open_record("sample", New, seal("sample", Old("n", {}))) == New("n", {}, ("default",))


def test_an_envelope_with_later_fields_is_read() -> None:
    fields = msgspec.msgpack.decode(seal("sample", SAMPLE)[len(MAGIC) :])
    longer = MAGIC + msgspec.msgpack.encode([*fields, "a later field", {"and": "another"}])
    assert open_record("sample", New, longer) == SAMPLE


def test_a_record_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(RecordError, match="expected a 'member' record, found 'sample'"):
        open_record("member", New, seal("sample", SAMPLE))


def test_a_record_of_another_schema_says_which_was_expected() -> None:
    with pytest.raises(RecordError, match=r"schema New.*Expected `str`"):
        open_record("sample", New, seal("sample", [1, {}]))


def _envelope(format: int = 1, code: bytes = b"") -> bytes:
    return MAGIC + msgspec.msgpack.encode([format, "sample", code, msgspec.msgpack.encode(SAMPLE)])


def test_a_later_format_says_expected_and_found() -> None:
    with pytest.raises(RecordError, match="expected format 1, found 2"):
        open_record("sample", New, _envelope(format=2))


def test_a_record_opens_with_the_key_and_at_the_place_it_was_sealed_for() -> None:
    assert open_record("sample", New, seal("sample", SAMPLE, place="p", key=KEY), place="p", key=KEY) == SAMPLE


@pytest.mark.parametrize(
    "found",
    [
        seal("sample", SAMPLE, place="elsewhere", key=KEY),
        seal("sample", SAMPLE, place="p", key=Secret(b"another secret of some job").key("job")),
        seal("sample", SAMPLE, place="p", key=SECRET.key("another job")),
        seal("sample", SAMPLE, place="p", key=KEY)[:-1] + b"!",
        seal("another", SAMPLE, place="p", key=KEY).replace(b"another", b"sample!"),
    ],
    ids=["place", "secret", "job", "payload", "kind"],
)
def test_a_code_for_anything_else_is_wrong(found: bytes) -> None:
    with pytest.raises(RecordError, match="authentication code is wrong: the members' secrets differ"):
        open_record("sample", New, found, place="p", key=KEY)


def test_a_wrong_code_is_found_before_the_payload_is_looked_at() -> None:
    with pytest.raises(RecordError, match="code is wrong"):
        open_record("sample", New, seal("sample", 7, place="elsewhere", key=KEY), place="p", key=KEY)


@pytest.mark.parametrize("code", [b"", b"c", b"c" * 31, b"c" * 32, b"c" * 33])
def test_a_code_of_any_length_that_is_not_the_right_one_is_refused(code: bytes) -> None:
    with pytest.raises(RecordError, match="authentication code"):
        open_record("sample", New, _envelope(code=code), key=KEY)


def test_the_beginning_of_the_right_code_is_not_enough() -> None:
    fields = msgspec.msgpack.decode(seal("sample", SAMPLE, key=KEY)[len(MAGIC) :])
    fields[2] = fields[2][:16]
    with pytest.raises(RecordError, match="code is wrong"):
        open_record("sample", New, MAGIC + msgspec.msgpack.encode(fields), key=KEY)


def test_members_with_and_without_a_secret_do_not_believe_each_other_and_say_what_to_do() -> None:
    with pytest.raises(RecordError, match=r"carries an authentication code: the job has a secret; .*WEFT_SECRET"):
        open_record("sample", New, seal("sample", SAMPLE, key=KEY))
    with pytest.raises(RecordError, match=r"no authentication code: its writer has no secret; .*WEFT_SECRET"):
        open_record("sample", New, seal("sample", SAMPLE), key=KEY)


def test_every_truncation_is_refused() -> None:
    data = seal("sample", SAMPLE)
    for length in range(len(data)):
        with pytest.raises(RecordError):
            open_record("sample", New, data[:length])
    with pytest.raises(RecordError):
        open_record("sample", New, data + b"\x00")


def test_oversized_records_are_refused_on_both_sides() -> None:
    too_long = b"x" * LIMIT_BYTES["rendezvous"]
    with pytest.raises(RecordError, match="at most 1048576 bytes"):
        seal("rendezvous", too_long)
    with pytest.raises(RecordError, match="at most 1048576 bytes"):
        open_record("rendezvous", bytes, seal("other", too_long))
    with pytest.raises(RecordError, match=f"at most {DEFAULT_LIMIT_BYTES} bytes"):
        open_record("other", bytes, bytes(DEFAULT_LIMIT_BYTES + 1))


def _open(data: bytes) -> None:
    with contextlib.suppress(RecordError):
        assert isinstance(open_record("sample", New, data), New)


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_record_errors(data: bytes) -> None:
    _open(data)
    _open(MAGIC + data)
    _open(MAGIC + msgspec.msgpack.encode([1, "sample", b"", data]))


@given(st.data())
def test_mutated_records_raise_nothing_but_record_errors(data: st.DataObject) -> None:
    record = bytearray(seal("sample", SAMPLE))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(record) - 1))
        action = data.draw(st.sampled_from(["replace", "delete", "insert"]))
        if action == "replace":
            record[position] = data.draw(st.integers(0, 255))
        elif action == "delete":
            del record[position]
        else:
            record.insert(position, data.draw(st.integers(0, 255)))
    _open(bytes(record))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RecordError):
        open_record("sample", list, MAGIC + msgspec.msgpack.encode([1, "sample", b"", b"\x91" * 100_000]))
