"""What a policy may say, and what is refused by name until it is built."""

from __future__ import annotations

from typing import Any

import pytest

import weft


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encodings": ("fp8_block",)}, "encodings fp8_block are not built yet"),
    ],
)
def test_what_is_not_built_refuses_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(weft.NotSupportedError, match=words):
        weft.Policy(**fields).check()


def test_every_contradiction_is_named_at_once() -> None:
    policy = weft.Policy(casts=(("float32", "bf16"),), bucket_bytes=1, staging_bytes=0, relay="rack")
    with pytest.raises(weft.ConfigError) as error:
        policy.check()
    for words in ("cast float32 to bf16", "bucket_bytes is 1", "staging_bytes is 0", "relay 'rack' is none of"):
        assert words in str(error.value)


@pytest.mark.parametrize("fields", [{"landing": "beside"}, {"drive": "by itself"}])
def test_a_misspelt_choice_is_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(weft.ConfigError, match="is none of"):
        weft.Policy(**fields).check()
