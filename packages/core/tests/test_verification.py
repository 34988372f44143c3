"""Comparing ranks with a checkpoint: what is reported is what differs, by name, and nothing is passed unread."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.builder import LayoutBuilder
from weft.compare import RankComparison, Reference, compare
from weft.digest import Digest, digest_array
from weft.errors import ConfigError
from weft.layout import Kind, Layout
from weft.naive import Bits, elements_of, expected_memory, fill_elements
from weft.policy import Policy
from weft.testing.models import Case, Rank, random_case
from weft.verification import State, Verification, verdict
from weft.views import torch_dtype


def reference_of(case: Case, values: Mapping[str, Bits]) -> Reference:
    tensors = {t.name: torch.from_numpy(values[t.name]).view(torch_dtype(t.dtype)) for t in case.tensors}
    return Reference(tensors, case.ties)


def as_tensors(layout: Layout, memory: Mapping[str, Bits]) -> dict[str, torch.Tensor]:
    return {b.name: torch.from_numpy(memory[b.name]).view(torch_dtype(b.dtype)) for b in layout.buffers}


def bytes_that_differ(rank: Rank, memory: Mapping[str, Bits], good: Mapping[str, Bits]) -> tuple[dict[str, int], int]:
    """By the definition: differing elements by tensor, and differing padding elements."""
    counts: dict[str, int] = {}
    for piece in rank.layout:
        _, at = elements_of(piece)
        wrong = int((memory[piece.buffer][at] != good[piece.buffer][at]).sum())
        counts[piece.tensor] = counts.get(piece.tensor, 0) + wrong
    padding = sum(
        int((memory[f.buffer][fill_elements(f)] != good[f.buffer][fill_elements(f)]).sum()) for f in rank.layout.fills
    )
    return {name: wrong for name, wrong in counts.items() if wrong}, padding


def found_in(comparison: RankComparison) -> dict[str, int]:
    return {
        each.name: sum(difference.differing_elements for difference in each.differences)
        for each in comparison.tensors
        if each.differences
    }


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_digests_say_what_bytes_say_on_any_mesh(seed: int) -> None:
    random = Random(seed)
    case = random_case(random)
    values = case.values(seed)
    reference = reference_of(case, values)
    chosen = random.choice(case.targets).member.replica
    ranks = [rank for rank in case.targets if rank.member.replica == chosen]
    comparisons, wrong, padding = {}, set(), 0
    for rank in ranks:
        good = expected_memory(values, rank.layout)
        memory = {name: part.copy() for name, part in good.items()}
        for _ in range(random.choice((0, 0, 1, 3))):
            buffer = memory[random.choice(list(memory))].view(np.uint8) if memory else np.zeros(0, np.uint8)
            if len(buffer):
                buffer[random.randrange(len(buffer))] ^= 1 << random.randrange(8)
        comparison = compare(rank.layout, as_tensors(rank.layout, memory), reference, Policy())
        differing, fills = bytes_that_differ(rank, memory, good)
        assert found_in(comparison) == differing
        assert bool(comparison.padding) == bool(fills)
        comparisons[rank.member.name] = comparison
        wrong |= differing.keys()
        padding += fills
    whole = verdict(comparisons, reference, Policy())
    assert {each.name for each in whole.tensors if each.state is State.DIFFERENT} == wrong
    assert bool(whole.padding) == bool(padding)
    for each in whole.tensors:
        assert each.state in (State.EQUAL, State.DIFFERENT)
        if each.digest:
            on_disk = reference.name(each.name)
            assert on_disk is not None
            assert each.digest == digest_array(on_disk, values[on_disk]).hex()
    if whole.digest:
        assert not wrong
        assert whole.digest == sum((digest_array(t.name, values[t.name]) for t in case.tensors), Digest()).hex()


WEIGHT = torch.arange(32, dtype=torch.float32).reshape(8, 4)
HEAD = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7


def rows(start: int, stop: int, dtype: str = "float32", kind: Kind = Kind.LIVE) -> Layout:
    """A rank with rows start:stop of the weight, then one padding element of value 1."""
    builder = LayoutBuilder()
    builder.tensor("weight", (8, 4), dtype)
    builder.buffer("w", dtype, (stop - start) * 4 + 1, group="g", kind=kind)
    builder.shard("weight", "w", start=start, stop=stop)
    builder.fill("w", (stop - start) * 4, (1,), (1,), 1.0)
    return builder.build()


def held(start: int, stop: int) -> dict[str, torch.Tensor]:
    return {"w": torch.cat([WEIGHT[start:stop].flatten(), torch.ones(1)])}


def outcome(
    *ranks: tuple[Layout, dict[str, torch.Tensor]], policy: Policy | None = None, **more: torch.Tensor
) -> Verification:
    policy = policy or Policy()
    reference = Reference({"weight": WEIGHT, **more}, {})
    found = {f"engine/{n}": compare(layout, memory, reference, policy) for n, (layout, memory) in enumerate(ranks)}
    return verdict(found, reference, policy)


def states(found: Verification) -> dict[str, State]:
    return {each.name: each.state for each in found.tensors}


def test_equal_ranks_are_equal_and_counted_once() -> None:
    found = outcome((rows(0, 5), held(0, 5)), (rows(5, 8), held(5, 8)), (rows(0, 5), held(0, 5)))
    assert states(found) == {"weight": State.EQUAL}
    assert found.digest == digest_array("weight", WEIGHT.numpy()).hex()
    assert found.failures() == []
    assert found.bytes == (5 + 3 + 5) * 4 * 4
    assert found.tensors[0].ranks == ("engine/0", "engine/1", "engine/2")


def test_one_flipped_bit_names_the_tensor_the_rank_the_box_and_the_element() -> None:
    damaged = held(5, 8)
    damaged["w"][6] = 26.5
    found = outcome((rows(0, 5), held(0, 5)), (rows(5, 8), damaged))
    (each,) = found.tensors
    assert (each.state, each.reason, each.digest) == (State.DIFFERENT, "1 elements differ on engine/1", "")
    (where,) = each.differences
    assert (where.rank, where.difference.box, where.difference.buffer) == ("engine/1", "[5:8, 0:4] of (8, 4)", "w")
    assert (where.difference.differing_elements, where.difference.differing_bytes) == (1, 1)
    (example,) = where.difference.examples
    assert (example.index, example.expected, example.found) == ((6, 2), "26.0 (0x41d00000)", "26.5 (0x41d40000)")
    assert found.digest == ""
    assert found.failures() == ["weight: 1 elements differ on engine/1"]


@pytest.mark.trap(13, 69)
def test_padding_must_hold_its_value() -> None:
    damaged = held(0, 8)
    damaged["w"][32] = 2
    found = outcome((rows(0, 8), damaged))
    assert found.failures() == ["engine/0: w: 1 of 1 padding elements from 32 on do not hold 1.0"]


@pytest.mark.trap(12)
def test_elements_that_no_rank_holds_are_a_failure() -> None:
    found = outcome((rows(0, 5), held(0, 5)), (rows(6, 8), held(6, 8)))
    assert states(found) == {"weight": State.LOADED_IN_PART}
    assert found.failures() == ["weight: 4 elements are held by no rank"]


@pytest.mark.trap(13)
def test_a_tensor_on_one_side_only_is_a_failure_unless_it_is_ignored() -> None:
    found = outcome((rows(0, 8), held(0, 8)), head=HEAD, empty=torch.zeros(0, 3))
    assert states(found) == {"head": State.NOT_LOADED, "weight": State.EQUAL}
    assert outcome((rows(0, 8), held(0, 8)), policy=Policy(ignore=("he*",)), head=HEAD).failures() == []
    reference = Reference({"head": HEAD}, {})
    other = verdict({"r": compare(rows(0, 8), held(0, 8), reference, Policy())}, reference, Policy())
    assert states(other) == {"head": State.NOT_LOADED, "weight": State.NOT_IN_CHECKPOINT}
    assert "no byte was compared" in other.failures()


@pytest.mark.trap(11)
def test_another_dtype_is_a_failure_unless_the_cast_is_declared() -> None:
    rounded = {"w": held(0, 8)["w"].to(torch.bfloat16)}
    found = outcome((rows(0, 8, "bfloat16"), rounded))
    assert states(found) == {"weight": State.UNEQUAL_KIND}
    assert "declare the cast float32:bfloat16" in found.failures()[0]
    policy = Policy(casts=(("float32", "bfloat16"),))
    assert outcome((rows(0, 8, "bfloat16"), rounded), policy=policy).failures() == []
    rounded["w"][3] += 1
    assert states(outcome((rows(0, 8, "bfloat16"), rounded), policy=policy)) == {"weight": State.DIFFERENT}


@pytest.mark.trap(11)
def test_another_shape_is_a_failure() -> None:
    reference = Reference({"weight": WEIGHT.reshape(4, 8)}, {})
    found = verdict({"r": compare(rows(0, 8), held(0, 8), reference, Policy())}, reference, Policy())
    assert states(found) == {"weight": State.UNEQUAL_KIND}
    assert "has shape [4, 8], here it has [8, 4]" in found.failures()[0]


@pytest.mark.trap(55)
def test_what_cannot_be_read_is_named_and_never_passes_by_itself() -> None:
    found = outcome((rows(0, 5), held(0, 5)), (rows(5, 8, kind=Kind.SCRATCH), held(5, 8)))
    assert states(found) == {"weight": State.NOT_COMPARED}
    assert "w: the engine keeps it in its kernels' own format" in found.failures()[0]
    assert found.failures(partial=True) == []
    nothing = outcome((rows(0, 8, kind=Kind.SCRATCH), held(0, 8)))
    assert nothing.failures(partial=True) == ["no byte was compared"]
    reference = Reference({"weight": WEIGHT}, {})
    derived = compare(rows(0, 8), held(0, 8), reference, Policy(), {"w": "its loading computes"})
    assert derived.tensors[0].unread == "w: its loading computes"


def tied() -> tuple[Layout, dict[str, torch.Tensor]]:
    builder = LayoutBuilder()
    builder.tensor("embed", (3, 4), "float32")
    builder.buffer("e", "float32", 12, group="g")
    builder.shard("embed", "e")
    builder.tie("head", "embed")
    return builder.build(), {"e": HEAD.flatten()}


@pytest.mark.trap(13)
def test_ties_of_either_side_are_followed() -> None:
    layout, memory = tied()
    for reference, wrong in (
        (Reference({"embed": HEAD}, {}), []),
        (Reference({"embed": HEAD}, {"head": "embed"}), []),
        (Reference({"embed": HEAD, "head": HEAD.clone()}, {}), []),
        (Reference({"embed": HEAD, "head": HEAD + 1}, {}), ["head"]),
        (Reference({"head": HEAD}, {}), []),
    ):
        found = verdict({"r": compare(layout, memory, reference, Policy())}, reference, Policy())
        assert [each.name for each in found.tensors if each.state is not State.EQUAL] == wrong
        assert {reference.name(each.name) for each in found.tensors} == set(reference.tensors)


def test_a_reference_is_made_of_whole_tensors_only() -> None:
    class Halves:
        def layout(self) -> Layout:
            return rows(0, 4)

        def memory(self) -> dict[str, torch.Tensor]:
            return held(0, 4)

    with pytest.raises(ConfigError, match="weight is not one dense piece"):
        Reference.of(Halves())  # type: ignore[arg-type]
