"""Batches: every byte once and in order, within limits, and the same at both ends."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from weft.batches import Division, Limits, Part, batches_of, divide
from weft.contracts import SEGMENT, Bucket
from weft.errors import ConfigError
from weft.member import Region

LIMITS = some.builds(
    lambda staging, more, operations, below: Limits(staging + more, operations, below, staging),
    some.integers(1, 40),
    some.integers(0, 40),
    some.integers(1, 4),
    some.integers(0, 60),
)
LENGTHS = some.lists(some.integers(0, 100), max_size=30)


def parts(division: Division) -> list[Part]:
    return sorted([*division.packed, *division.direct])


@pytest.mark.trap(36, 42)
@given(LENGTHS, LIMITS)
def test_every_byte_is_in_one_batch_in_order_and_batches_are_within_limits(lengths: list[int], limits: Limits) -> None:
    divisions = divide(lengths, limits)
    covered = [(part.segment, byte) for each in divisions for part in parts(each) for byte in _bytes(part)]
    assert covered == [(segment, byte) for segment, nbytes in enumerate(lengths) for byte in range(nbytes)]
    for each in divisions:
        packed, direct = sum(p.nbytes for p in each.packed), sum(p.nbytes for p in each.direct)
        assert 0 < packed + direct <= limits.batch_bytes
        assert packed <= limits.staging_bytes
        assert len(each.direct) + bool(each.packed) <= limits.operations
        assert all(lengths[part.segment] < limits.pack_below_bytes for part in each.packed)
        assert all(lengths[part.segment] >= limits.pack_below_bytes for part in each.direct)


@given(LENGTHS, LIMITS)
def test_no_batch_could_have_taken_the_first_part_of_the_next(lengths: list[int], limits: Limits) -> None:
    divisions = divide(lengths, limits)
    for each, after in pairwise(divisions):
        first = parts(after)[0]
        small = first in after.packed
        packed, direct = sum(p.nbytes for p in each.packed), sum(p.nbytes for p in each.direct)
        too_long = packed + direct + first.nbytes > limits.batch_bytes
        no_room = small and packed + first.nbytes > limits.staging_bytes
        operations = len(each.direct) + (not small) + bool(each.packed or small)
        assert too_long or no_room or operations > limits.operations


def test_a_segment_is_cut_only_where_it_is_longer_than_a_batch() -> None:
    limits = Limits(batch_bytes=100, operations=8, pack_below_bytes=10, staging_bytes=20)
    assert divide([250, 9, 60], limits) == (
        Division((), (Part(0, 0, 100),)),
        Division((), (Part(0, 100, 100),)),
        Division((Part(1, 0, 9),), (Part(0, 200, 50),)),
        Division((), (Part(2, 0, 60),)),
    )
    everything_packed = Limits(batch_bytes=20, operations=1, pack_below_bytes=1 << 62, staging_bytes=20)
    assert [[*d.packed] for d in divide([50], everything_packed)] == [
        [Part(0, 0, 20)],
        [Part(0, 20, 20)],
        [Part(0, 40, 10)],
    ]


@pytest.mark.trap(33, 38, 42)
@given(some.lists(some.integers(0, 60), max_size=12), LIMITS, some.randoms())
def test_what_one_end_gathers_the_other_scatters_to_its_own_places(
    lengths: list[int], limits: Limits, random: Random
) -> None:
    rows = np.zeros(len(lengths), SEGMENT)
    rows["nbytes"] = lengths
    order = list(range(len(lengths)))
    for side in ("offset", "remote_offset"):
        random.shuffle(order)
        for place, row in enumerate(order):
            rows[side][row] = 61 * place
    mirror = rows.copy()
    mirror["offset"] = rows["remote_offset"]
    size = 61 * len(lengths) + 1
    here = Region("here", torch.arange(size).to(torch.uint8))
    there = Region("there", torch.full((size,), 0xA5, dtype=torch.uint8))
    expected = there.memory.clone()
    for _, offset, _, remote_offset, nbytes in rows.tolist():
        expected[remote_offset : remote_offset + nbytes] = here.memory[offset : offset + nbytes]
    out_staging, in_staging = (torch.full((limits.staging_bytes,), 0xA5, dtype=torch.uint8) for _ in "ab")
    sent = batches_of(Bucket(0, "b", rows), [here], limits)
    for batch, into in zip(sent, batches_of(Bucket(0, "a", mirror), [there], limits), strict=True):
        for source, target in zip(batch.gather(out_staging), into.through(in_staging), strict=True):
            target.copy_(source)
        into.scatter(in_staging)
    assert torch.equal(there.memory, expected)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"batches of 10 bytes and 1 operations with 11 bytes of staging"):
        Limits(batch_bytes=10, operations=1, pack_below_bytes=1, staging_bytes=11)


def _bytes(part: Part) -> range:
    return range(part.start, part.start + part.nbytes)
