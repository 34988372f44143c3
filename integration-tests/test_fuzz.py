"""Every decoder of core and of the transports refuses damaged input in weft's words; `tools/fuzz.py` does more."""

from __future__ import annotations

import msgspec
import pytest

import fuzz
from decoders import WHOLE, readers, schemas, unread
from fuzz import Outcome
from mutations import Reader, inputs
from weft.records import decoded

INPUTS = 300


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[Reader]:
    return readers(tmp_path_factory.mktemp("fuzzed"))


def test_damaged_input_is_refused_or_decoded(table: list[Reader]) -> None:
    for reader in table:
        outcome = fuzz.fuzz(reader, int(INPUTS * reader.share), seed=0)
        assert not outcome.faults, f"{reader.name}: {outcome.faults[0]}"
        assert outcome.refused, f"{reader.name}: nothing was refused"
        if reader.share == 1:
            assert outcome.refused < outcome.inputs, f"{reader.name}: everything was refused, so little was tried"


def test_no_decoder_is_forgotten(table: list[Reader]) -> None:
    assert unread(table) == []
    names = {reader.name.removeprefix("schema ") for reader in table}
    found = dict(schemas())
    assert {kind for name, kind in found.items() if name not in WHOLE} <= {found[n] for n in names if n in found}
    for name in (
        "weft.wire.Notice",
        "weft.control.Hello",
        "weft_nixl.transport.Address",
        "weft_gloo.transport.Address",
    ):
        assert name in found
    assert {"record rendezvous with a secret", "plan file", "slice and its proof", "configuration file"} <= names


class Shape(msgspec.Struct, array_like=True):
    """What the decoders below are given."""

    numbers: list[int]


def outcome_of(read: object) -> Outcome:
    return fuzz.fuzz(Reader("x", [b"\x91\x93\x01\x02\x03"], read), 400, seed=0)  # type: ignore[arg-type]


def test_a_decoder_that_raises_something_else_is_found() -> None:
    def read(data: bytes) -> None:
        if 127 in decoded(Shape, data, "").numbers:
            raise KeyError("127")

    faults = outcome_of(read).faults
    assert faults
    assert all(fault.startswith("KeyError: '127'; seed 0, input ") for fault in faults)


def test_a_decoder_that_does_not_end_and_one_that_keeps_what_it_reads_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spins(data: bytes) -> None:
        while 127 in decoded(Shape, data, "").numbers:
            pass

    monkeypatch.setattr(fuzz, "LONGEST_SECONDS", 0.05)
    assert any(fault.startswith("TimeoutError: not decoded within 0.05 s") for fault in outcome_of(spins).faults)
    kept: list[bytes] = []
    monkeypatch.setattr(fuzz, "LONGEST_SECONDS", 5.0)
    monkeypatch.setattr(fuzz, "MOST_GROWTH_BYTES", 16 << 20)

    def grows(data: bytes) -> None:
        kept.append(b"\x01" * (1 << 17))

    assert any(fault.startswith("memory grew by ") for fault in outcome_of(grows).faults)


def test_the_same_seed_gives_the_same_inputs(table: list[Reader]) -> None:
    (reader,) = (reader for reader in table if reader.name == "slice and its proof")
    first, again, other = (list(inputs(reader, 50, seed)) for seed in (1, 1, 2))
    assert first == again != other
