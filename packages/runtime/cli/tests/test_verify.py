"""`weft verify` with an adapter of a framework that does not exist: output, JSON, exit codes, processes that die."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_ADAPTER = """
import os, time
from weft.compare import Difference, Example
from weft.errors import ConfigError, PlanError
from weft.verification import RankDifference, State, TensorVerdict, Verification

def boxes(count):
    example = Example((3, 1), "1.0 (0x3f800000)", "2.0 (0x40000000)")
    each = [Difference(f"[{n}:4] of (4,)", "b", 9, 1, 2, (example,)) for n in range(count)]
    return tuple(RankDifference("rank 1", one) for one in each)

class Toy:
    def verify(self, request, report):
        report(f"dtype {request.dtype}, options {request.options}")
        if request.options.get("fail") == "usage":
            raise ConfigError("toy has no such thing")
        if request.options.get("fail") == "refused":
            raise PlanError(["toy does not fit"])
        if request.options.get("fail") == "die":
            print("the last words", flush=True)
            os._exit(3)
        if request.options.get("fail") == "hang":
            time.sleep(600)
        assert request.parallel == {"tp": 2} and request.casts == (("float32", "bfloat16"),), request
        tensors = [TensorVerdict("a[0]", State.EQUAL, ("rank 0", "rank 1"), "ab" * 16)]
        if "packed" in request.checkpoint:
            tensors.append(TensorVerdict("p", State.NOT_COMPARED, ("rank 0",), reason="packed"))
        if "different" in request.checkpoint:
            tensors.append(TensorVerdict("d", State.DIFFERENT, ("rank 1",), reason="6 differ", differences=boxes(6)))
        return Verification(tuple(tensors), (), (("cache", "computed"),), 1234, "ab" * 16)

class Mute:
    pass

toy, mute = Toy(), Mute()
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs the adapters `toy` and `mute`, for this process and its children; returns a model's directory."""
    info = tmp_path / "verify_toy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verify-toy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[weft.adapters]\ntoy = verify_toy:toy\nmute = verify_toy:mute\n")
    (tmp_path / "verify_toy.py").write_text(_ADAPTER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def verify(weft, toy: Path):  # type: ignore[no-untyped-def]
    """Calls `weft verify toy:tp2` on the model with further arguments."""
    fixed = ["verify", "toy:tp2", "--model", str(toy), "--cast", "float32:bfloat16"]
    return lambda *arguments: weft(*fixed, *arguments)


def test_equal_weights_end_in_0_and_name_the_digest(verify) -> None:
    code, out, err = verify()
    assert code == 0, err
    assert "1 equal" in out
    assert "1,234 compared" in out
    assert "ab" * 16 in out
    assert "left out           cache: computed" in out
    assert "every tensor is equal" in out
    assert "a[0]" not in out
    assert "equal              a[0]  " + "ab" * 16 in verify("--all")[1]


def test_a_difference_ends_in_1_with_its_place_and_values(verify) -> None:
    code, out, _ = verify("--checkpoint", "different")
    assert code == 1
    for line in (
        "different          d  6 differ",
        "rank 1, b, [0:4] of (4,): 1 of 9 elements, 2 bytes",
        "  [3, 1] expected 1.0 (0x3f800000), found 2.0 (0x40000000)",
        "and 2 more boxes",
        "1 faults",
    ):
        assert line in out
    code, out, _ = verify("--checkpoint", "different", "--json")
    assert code == 1
    found = json.loads(out)
    assert found["failures"] == ["d: 6 differ"]
    assert len(found["tensors"][1]["differences"]) == 6


def test_what_was_not_compared_passes_only_when_that_is_accepted(verify) -> None:
    code, out, _ = verify("--checkpoint", "packed")
    assert code == 1
    assert "not compared       p: packed" in out
    code, out, _ = verify("--checkpoint", "packed", "--partial")
    assert code == 0
    assert "not compared       p: packed" in out
    assert "what could be compared is equal" in out


@pytest.mark.parametrize(
    ("arguments", "expected", "words"),
    [
        (["--options", '{"fail": "usage"}'], 2, "toy has no such thing"),
        (["--options", '{"fail": "refused"}'], 1, "toy does not fit"),
        (["--options", '{"fail": "die"}'], 1, "the last words"),
        (["--options", '{"fail": "hang"}', "--timeout", "4"], 1, "is not done after 4 s"),
        (["--options", "{"], 2, "--options is not JSON"),
        (["--options", "[]"], 2, "should be a JSON object, found list"),
        (["--cast", "float3:bfloat16"], 2, "expected FROM:TO, such as float32:bfloat16"),
    ],
)
def test_faults_are_told_in_words(verify, arguments: list[str], expected: int, words: str) -> None:
    code, out, err = verify(*arguments)
    assert code == expected, err
    assert words in err
    assert out == ""


@pytest.mark.parametrize(
    ("what", "expected", "words"),
    [("mute", 2, "has nothing that can be verified"), ("nothing", 1, "no adapter 'nothing' is installed")],
)
def test_an_adapter_that_cannot_is_named(weft, toy: Path, what: str, expected: int, words: str) -> None:
    code, _, err = weft("verify", what, "--model", str(toy))
    assert code == expected
    assert words in err


def test_a_model_that_is_not_there_is_a_usage_error(weft) -> None:
    code, _, err = weft("verify", "module", "--model", "/nowhere")
    assert code == 2
    assert "--model /nowhere: no such directory" in err
