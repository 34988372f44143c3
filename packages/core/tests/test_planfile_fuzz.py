"""Fuzzing the loader of plan files: it refuses bytes in its own words, or gives the plan that was saved."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.builder import LayoutBuilder
from weft.copies import Parts, Routes
from weft.errors import PlanError, RecordError
from weft.layout import Layout
from weft.member import Member
from weft.plan import Plan, plan
from weft.planfile import FORMAT_VERSION, MAGIC, load_plan, save_plan

PREFIX = struct.Struct("<8sIII")
ALIGNMENT = 64
MOST_BYTES = 8 << 20
"""A loader that reads a few kilobytes has no business with more memory than this."""
often = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def layout(axis: int, part: int, parts: int) -> Layout:
    builder = LayoutBuilder()
    for name, shape in (("up", (8, 6, 4)), ("down", (6, 8, 2))):
        size = shape[axis] // parts
        builder.tensor(name, shape, "bfloat16")
        builder.buffer(name, "bfloat16", shape[0] * shape[1] * shape[2] // parts, group=name)
        builder.shard(name, name, axis=axis, start=part * size, stop=(part + 1) * size)
    return builder.build()


@pytest.fixture(scope="module")
def made() -> Plan:
    held, wanted = [layout(1, n, 2) for n in range(2)], [layout(0, n, 2) for n in range(2)]
    sources = [Member(f"s{n}", each.address, None, None, 0, "h", "h", "cpu") for n, each in enumerate(held)]
    targets = [Member(f"t{n}", None, each.address, "r", 2, "h", "h", "cpu") for n, each in enumerate(wanted)]
    return plan(sources, targets, {each.address: each for each in (*held, *wanted)})


@pytest.fixture(scope="module")
def saved(made: Plan, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "plan"
    save_plan(made, path)
    return path.read_bytes()


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], Plan | None]:
    """Loads bytes as a plan file; None when they are refused in weft's own words. Any other error, and memory beyond
    `MOST_BYTES`, fail the test.
    """

    def run(data: bytes) -> Plan | None:
        path = tmp_path / "plan"
        path.unlink(missing_ok=True)  # a plan that was loaded before keeps its own file
        path.write_bytes(data)
        tracemalloc.start()
        try:
            return load_plan(path)
        except (RecordError, PlanError):
            return None
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < MOST_BYTES

    return run


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a plan file."""
    _, _, length, _ = PREFIX.unpack_from(data)
    start = -(-(PREFIX.size + length) // ALIGNMENT) * ALIGNMENT
    return msgspec.msgpack.decode(data[PREFIX.size : PREFIX.size + length]), data[start:]


def file_of(header: bytes, body: bytes) -> bytes:
    """A plan file whose first checksum is right."""
    head = PREFIX.pack(MAGIC, FORMAT_VERSION, len(header), zlib.crc32(header)) + header
    return head + bytes(-len(head) % ALIGNMENT) + body


def assert_equal(loaded: Plan, made: Plan) -> None:
    assert (loaded.members, loaded.tensors, loaded.policy) == (made.members, made.tensors, made.policy)
    assert loaded.fingerprint == made.fingerprint
    np.testing.assert_array_equal(loaded.splits, made.splits)
    for kind, ours, theirs in ((Parts, loaded.parts, made.parts), (Routes, loaded.routes, made.routes)):
        for field in fields(kind):
            np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))


def test_what_is_saved_is_loaded_and_so_is_what_is_put_together_again(
    made: Plan, saved: bytes, load: Callable[[bytes], Plan | None]
) -> None:
    header, body = parts_of(saved)
    for data in (saved, file_of(msgspec.msgpack.encode(header), body)):
        loaded = load(data)
        assert loaded is not None
        assert_equal(loaded, made)


@often
@given(data=st.data())
def test_damaged_bytes_are_refused_or_the_same_plan(
    made: Plan, saved: bytes, load: Callable[[bytes], Plan | None], data: st.DataObject
) -> None:
    raw = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        match data.draw(st.sampled_from(("flip", "cut", "insert", "remove", "repeat"))):
            case "flip" if at < len(raw):
                raw[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del raw[at:]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=64))
            case "remove":
                del raw[at : at + data.draw(st.integers(1, 64))]
            case "repeat":
                raw[at:at] = raw[at : at + 64]
    loaded = load(bytes(raw))
    if loaded is not None:
        assert_equal(loaded, made)


@often
@given(tail=st.binary(max_size=4096), whole=st.booleans())
def test_random_bytes_are_refused(load: Callable[[bytes], Plan | None], tail: bytes, whole: bool) -> None:
    assert load(tail if whole else MAGIC + FORMAT_VERSION.to_bytes(4, "little") + tail) is None


@often
@given(version=st.integers(0, 2**32 - 1).filter(lambda version: version != FORMAT_VERSION))
def test_every_other_format_version_is_refused_by_its_number(saved: bytes, tmp_path: Path, version: int) -> None:
    path = tmp_path / "plan"
    path.write_bytes(MAGIC + version.to_bytes(4, "little") + saved[12:])
    with pytest.raises(RecordError, match=f"format version {version}, this weft reads {FORMAT_VERSION}"):
        load_plan(path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.sampled_from((0, 1, -1, 2**31, 2**61, 2**63))
    | st.text(max_size=8) | st.binary(max_size=8) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@often
@given(data=st.data())
def test_a_header_that_lies_is_refused(
    made: Plan, saved: bytes, load: Callable[[bytes], Plan | None], data: st.DataObject
) -> None:
    """Checksums are right, so the header's words are all there is to go by."""
    header, body = parts_of(saved)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        if data.draw(st.integers(0, 7)):
            header[name] = data.draw(anything)
        elif len(header) > 1:
            del header[name]
    loaded = load(file_of(msgspec.msgpack.encode(header), body))
    if loaded is not None:
        assert loaded.fingerprint == made.fingerprint


@often
@given(data=st.data())
def test_columns_that_lie_are_refused_or_at_least_refer_to_what_is_there(
    saved: bytes, load: Callable[[bytes], Plan | None], data: st.DataObject
) -> None:
    header, body = parts_of(saved)
    words = np.frombuffer(body, dtype="<i8").copy()
    for _ in range(data.draw(st.integers(1, 4))):
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.integers(-(2**63), 2**63 - 1))
    body = words.tobytes()
    loaded = load(file_of(msgspec.msgpack.encode({**header, "body_checksum": zlib.crc32(body)}), body))
    if loaded is not None:
        for column, count in (
            (loaded.parts.tensor, len(loaded.tensors)), (loaded.routes.part, len(loaded.parts)),
            (loaded.routes.source, len(loaded.members)), (loaded.routes.target, len(loaded.members)),
        ):  # fmt: skip
            assert column.min(initial=0) >= 0
            assert column.max(initial=0) < count


@pytest.mark.parametrize("field", ["parts", "routes", "width", "body_bytes", "body_checksum", "planner"])
@pytest.mark.parametrize("value", [-(2**63), -1, 0, 2**31, 2**61, 2**63, 2**64 - 1])
def test_a_count_that_lies_is_refused(
    saved: bytes, load: Callable[[bytes], Plan | None], field: str, value: int
) -> None:
    header, body = parts_of(saved)
    assert header[field] != value
    assert load(file_of(msgspec.msgpack.encode({**header, field: value}), body)) is None


@pytest.mark.trap(18)
@pytest.mark.parametrize("field", ["layout", "host", "policy", "fingerprint"])
def test_a_plan_under_a_foreign_name_is_refused(saved: bytes, load: Callable[[bytes], Plan | None], field: str) -> None:
    header, body = parts_of(saved)
    match field:
        case "layout":
            header["members"][0][1] = "0" * 64
        case "host":
            header["members"][0][5] = "elsewhere"
        case "policy":
            header["policy"]["digests"] = False
        case "fingerprint":
            header["fingerprint"] = "0" * 64
    assert load(file_of(msgspec.msgpack.encode(header), body)) is None


def test_a_header_that_is_too_deep_is_refused(saved: bytes, load: Callable[[bytes], Plan | None]) -> None:
    _, body = parts_of(saved)
    assert load(file_of(b"\x81\xa1x" + b"\x91" * 200_000 + b"\xc0", body)) is None
