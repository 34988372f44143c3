"""Name maps translate both ways and report every bad name at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import LayoutError
from weft.layout import Tie
from weft.names import NameMap, NameRule, Skip, expand

PLAIN = NameRule(("decoder.{layer}.norm",), ("model.{layer}.norm",))
FUSED = NameRule(("decoder.{layer}.qkv",), ("model.{layer}.q", "model.{layer}.k", "model.{layer}.v"))
STACKED = NameRule(expand("moe.{layer}.weight{expert}", expert=range(3)), ("model.{layer}.experts",))
EMBEDDING = NameRule(("embedding",), ("model.embed",))
HEAD = NameRule(("output",), ("head",))
SKIP = Skip("*._extra_state", "Transformer Engine's own bookkeeping")


def make_map() -> NameMap:
    return NameMap([PLAIN, FUSED, STACKED, EMBEDDING, HEAD], ties=[Tie("head", "model.embed")], skips=[SKIP])


def test_one_name_translates_both_ways() -> None:
    names = make_map()
    assert names.logical("decoder.11.norm") == ("model.11.norm",)
    assert names.local("model.11.norm") == ("decoder.11.norm",)


def test_a_fused_name_holds_its_logical_names_in_order() -> None:
    names = make_map()
    assert names.logical("decoder.0.qkv") == ("model.0.q", "model.0.k", "model.0.v")
    assert names.local("model.0.k") == ("decoder.0.qkv",)


def test_the_parts_of_a_stack_share_their_logical_name() -> None:
    names = make_map()
    assert names.local("model.4.experts") == ("moe.4.weight0", "moe.4.weight1", "moe.4.weight2")
    assert names.logical("moe.4.weight2") == ("model.4.experts",)
    names.check(["moe.4.weight0", "moe.4.weight1", "moe.4.weight2"])


@pytest.mark.trap(13)
def test_tied_names_are_one_tensor_held_in_two_places() -> None:
    names = make_map()
    assert names.logical("output") == ("model.embed",)
    assert names.local("model.embed") == names.local("head") == ("embedding", "output")
    names.check(["embedding", "output"])


@pytest.mark.trap(13)
def test_a_skipped_name_carries_its_reason() -> None:
    names = make_map()
    assert names.skipped("decoder.0.qkv._extra_state") == SKIP.reason
    assert names.skipped("decoder.0.qkv") is None


@given(layer=st.integers(0, 10**6))
def test_translation_is_its_own_inverse(layer: int) -> None:
    names = make_map()
    for local in (f"decoder.{layer}.norm", f"decoder.{layer}.qkv", f"moe.{layer}.weight1"):
        assert all(local in names.local(logical) for logical in names.logical(local))


@pytest.mark.parametrize(
    "name", ["decoder..norm", "decoder.x.norm", "decoder.01.norm", "decoder.1.norm.bias", "xdecoder.1.norm"]
)
def test_placeholders_stand_for_whole_decimal_numbers(name: str) -> None:
    with pytest.raises(LayoutError, match="no rule covers"):
        make_map().logical(name)


def test_an_unknown_logical_name_is_an_error() -> None:
    with pytest.raises(LayoutError, match=r"model\.0\.o: no rule covers"):
        make_map().local("model.0.o")


@pytest.mark.trap(6)
def test_unmatched_ambiguous_and_colliding_names_are_reported_at_once() -> None:
    names = NameMap(
        [
            NameRule(("experts.{expert}",), ("model.experts.{expert}",)),
            NameRule(("local_experts.{expert}",), ("model.experts.{expert}x",)),
            NameRule(("local_experts.0",), ("model.experts.zero",)),
            NameRule(("shared",), ("model.experts.7",)),
        ],
        skips=[Skip("experts.9", "never trained")],
    )
    with pytest.raises(LayoutError) as caught:
        names.check(["experts.7", "shared", "local_experts.0", "experts.9", "unknown"])
    assert len(caught.value.faults) == 4
    text = str(caught.value)
    assert "experts.7 and shared both hold model.experts.7" in text
    assert "local_experts.0: covered 2 times" in text
    assert "experts.9: covered 2 times" in text
    assert "never trained" in text
    assert "unknown: no rule covers" in text


def test_a_faulty_declaration_lists_every_fault() -> None:
    with pytest.raises(LayoutError) as caught:
        NameMap(
            [
                NameRule(("a", "b"), ("c", "d")),
                NameRule(("e.{layer}",), ("f.{expert}",)),
                NameRule(("g",), ("h",)),
                NameRule(("g",), ("h",)),
                NameRule((), ("i",)),
            ],
            ties=[Tie("x", "y"), Tie("y", "z"), Tie("x", "z")],
        )
    text = str(caught.value)
    assert len(caught.value.faults) == 7
    assert "one side must have exactly one name" in text
    assert "different placeholders" in text
    assert "the local name g is declared twice" in text
    assert "the logical name h is declared twice" in text
    assert "y is an alias itself" in text
    assert "tie x: declared 2 times" in text
