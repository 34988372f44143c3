"""`Policy.only`: a refit of named tensors leaves the others as they are, and is proven for what it names."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.builder import LayoutBuilder
from weft.errors import PlanError
from weft.layout import Kind, Layout
from weft.member import Member
from weft.naive import all_ties, elements_of
from weft.plan import plan
from weft.policy import Policy
from weft.slices import prove, slice_of
from weft.testing.models import random_case


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
@pytest.mark.trap(3, 11)
def test_named_tensors_move_whole_and_no_other_does(seed: int) -> None:
    random = Random(seed)
    case = random_case(random)
    whole = plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts)
    chosen = random.choice(whole.tensors).name
    policy = Policy(only=(chosen,))
    try:
        made = plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)
    except PlanError as error:
        torn = ["lands as a whole" in fault for fault in error.faults]
    else:
        torn = []
    if torn:
        assert all(torn)
        return
    assert [tensor.name for tensor in made.tensors] == [chosen]
    assert made.fingerprint != whole.fingerprint
    ties = all_ties(*({r.member.name: r.layout for r in side} for side in (case.sources, case.targets)))
    wanted = sum(
        len(elements_of(piece)[0])
        for rank in case.targets
        for piece in rank.layout
        if ties.get(piece.tensor, piece.tensor) == chosen
    )
    assert made.copies.numel.sum() == wanted
    for rank in case.targets:
        prove(slice_of(made, rank.member.name), None, rank.layout)


def layout(kind: Kind, names: tuple[str, ...] = ("a", "b")) -> Layout:
    builder = LayoutBuilder()
    for name in names:
        builder.tensor(name, (4, 4), "float32")
        builder.buffer(name, "float32", 16, group="layer", kind=kind)
        builder.shard(name, name)
    return builder.build()


def members(held: Layout, wanted: Layout) -> tuple[Member, Member]:
    return (
        Member("trainer/0", held.address, None, None, 0, "h", "h", "cpu"),
        Member("rollout/0", None, wanted.address, "r", 1, "h", "h", "cpu"),
    )


def test_what_lands_together_is_not_torn() -> None:
    held, wanted = layout(Kind.LIVE), layout(Kind.SCRATCH)
    source, target = members(held, wanted)
    layouts = {each.address: each for each in (held, wanted)}
    with pytest.raises(PlanError, match=r"group layer lands as a whole: Policy\.only leaves out b"):
        plan([source], [target], layouts, Policy(only=("a",)))
    assert len(plan([source], [target], layouts, Policy(only=("a", "b"))).tensors) == 2


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    held = layout(Kind.LIVE)
    source, target = members(held, held)
    with pytest.raises(PlanError, match=r"'lora_A\.\*' is the name of no tensor"):
        plan([source], [target], {held.address: held}, Policy(only=("a", "lora_A.*")))


def test_tensors_of_one_side_only_are_no_fault_when_they_are_left_out() -> None:
    held, wanted = layout(Kind.LIVE, ("a", "tower")), layout(Kind.LIVE, ("a", "head"))
    source, target = members(held, wanted)
    layouts = {each.address: each for each in (held, wanted)}
    with pytest.raises(PlanError):
        plan([source], [target], layouts)
    assert [tensor.name for tensor in plan([source], [target], layouts, Policy(only=("a",))).tensors] == ["a"]
