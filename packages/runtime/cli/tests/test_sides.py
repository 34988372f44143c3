"""Parallel sizes as people write them."""

from __future__ import annotations

import pytest

from weft.errors import ConfigError
from weft_cli.sides import Side, check_axes, parse_side


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("megatron:tp2,pp2", Side("megatron", {"tp": 2, "pp": 2})),
        ("megatron:tp=2, pp=16", Side("megatron", {"tp": 2, "pp": 16})),
        ("vllm", Side("vllm", {})),
        (" vllm: ", Side("vllm", {})),
    ],
)
def test_sizes_are_read_in_both_spellings(text: str, side: Side) -> None:
    assert parse_side(text) == side


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_side("megatron:tp2,tp4,2pp,dp0")
    for words in ("axis tp is given twice", "'2pp'", "'dp0'", "megatron:tp2,pp2"):
        assert words in str(raised.value)


def test_an_unknown_axis_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no axis 'ept' \(did you mean 'etp'\?\)"):
        check_axes(Side("megatron", {"tp": 2, "ept": 2}), ("tp", "pp", "etp"))
