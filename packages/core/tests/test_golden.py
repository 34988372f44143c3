"""What weft once wrote is read as what it was: `golden/` holds payloads of every kind, by the day they were written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import weft

from .payloads import FOLDER, payloads, values_of

FILES = sorted(FOLDER.glob("*.json"), key=lambda file: file.stem)
NOW = payloads()


def holds(old: Any, new: Any) -> bool:
    """Whether every value of then is there, equal; structs may have got fields since, with defaults."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(name in new and holds(value, new[name]) for name, value in old.items())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(holds, old, new))
    return type(old) is type(new) and old == new


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_was_written_is_read_as_what_it_was(file: Path) -> None:
    for name, entry in json.loads(file.read_text()).items():
        assert name in NOW, f"{name}: nothing reads it any more; a format that goes needs a format version"
        found = values_of(NOW[name].read(bytes.fromhex(entry["bytes"])))
        assert holds(entry["value"], found), f"{name} of {file.stem}"


def test_a_value_that_differs_is_seen() -> None:
    assert holds({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2, "c": 3}], "d": 4})
    for new in (
        {"a": [1, {"b": 3}]},
        {"a": [1]},
        {"a": [1, {"c": 2}]},
        {"a": [1, {"b": 2.0}]},
        {"a": [1, {"b": 2}, 3]},
    ):
        assert not holds({"a": [1, {"b": 2}]}, new)


def test_the_newest_payloads_are_those_of_now() -> None:
    """Otherwise something is written that no later weft is tested to read."""
    newest = json.loads(FILES[-1].read_text())
    stale = [name for name, each in NOW.items() if newest.get(name, {}).get("bytes") != each.data.hex()]
    assert not stale, f"write them anew (cd packages/core; python -m tests.payloads), and keep the old file: {stale}"


def test_every_kind_of_record_is_among_them() -> None:
    files = [file for file in Path(weft.__file__).parent.rglob("*.py") if "testing" not in file.parts]
    texts = [file.read_text() for file in files]
    call = r"""\.(?:put|find|opened|lease|show)\(\s*"(\w+)\""""
    written = {kind for text in texts for kind in re.findall(call, text)}
    assert written >= {"rendezvous", "endpoint", "slice", "offer", "outcome"}
    assert {name.partition(" record ")[0] for name in NOW if " record " in name} == written
