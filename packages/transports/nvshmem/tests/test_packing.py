"""Tables of pieces, and the kernel that copies by them, in Triton's interpreter where Triton is installed."""

from __future__ import annotations

import importlib
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from weft.batches import Batch
from weft_nvshmem.packing import table_of


def pieces_of(memory: torch.Tensor, unit: int, random: Random) -> list[torch.Tensor]:
    pieces, at = [], unit * random.randint(0, 3)
    while len(pieces) < 30:
        nbytes = unit * random.randint(1, 60)
        pieces.append(memory[at : at + nbytes])
        at += nbytes + unit * random.randint(0, 3)
    return pieces


@pytest.mark.trap(27, 33)
@given(some.sampled_from([1, 2, 4, 8]), some.randoms(use_true_random=False))
def test_a_table_says_what_gathering_does_in_the_widest_elements_that_fit(unit: int, random: Random) -> None:
    memory = torch.arange(16_384).to(torch.uint8)
    pieces = pieces_of(memory, unit, random)
    rows, width = table_of(pieces)
    assert width >= unit
    places = [number for row in rows.tolist() for number in (row[0], width * row[1], width * row[2])]
    assert all(number % width == 0 for number in places)
    assert width == 8 or any(number % (2 * width) for number in places)
    slot = torch.full((16_384,), 0xA5, dtype=torch.uint8)
    Batch(tuple(pieces), ()).gather(slot)
    copied = torch.full((16_384,), 0xA5, dtype=torch.uint8)
    for address, offset, length in rows.tolist():
        start = address - memory.data_ptr()
        copied[offset * width :][: length * width] = memory[start:][: length * width]
    assert torch.equal(copied, slot)


@pytest.mark.trap(27, 33)
@pytest.mark.parametrize("unit", [1, 2, 4, 8])
def test_the_kernel_copies_what_the_reference_copies_both_ways(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are tested where it is")
    kernels = importlib.import_module("weft_nvshmem.kernels")
    memory = torch.arange(16_384).to(torch.uint8)
    pieces = pieces_of(memory, unit, Random(unit))
    slot, expected_slot = (torch.full((16_384,), 0xA5, dtype=torch.uint8) for _ in "ab")
    rows, width = table_of(pieces)
    kernels.copy(torch.from_numpy(rows), width, slot, True)
    Batch(tuple(pieces), ()).gather(expected_slot)
    assert torch.equal(slot, expected_slot)
    there, expected = (torch.full((16_384,), 0xA5, dtype=torch.uint8) for _ in "ab")
    targets = [there[piece.data_ptr() - memory.data_ptr() :][: piece.numel()] for piece in pieces]
    rows, width = table_of(targets)
    kernels.copy(torch.from_numpy(rows), width, slot, False)
    for piece in pieces:
        start = piece.data_ptr() - memory.data_ptr()
        expected[start : start + piece.numel()] = piece
    assert torch.equal(there, expected)
