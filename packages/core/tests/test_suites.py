"""Every conformance suite finds every broken plug-in that ships beside it, by the test that is about its fault."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from weft.testing.broken import Fault, encodings, sources, stores, targets, transports
from weft.testing.sources import SourceSuite, Trainer
from weft.testing.suite import Suite, within
from weft.testing.targets import Engine, TargetSuite
from weft.testing.transports import TransportSuite

HEAD = """\
import pytest
from weft.testing.broken import sources, targets
from weft.testing.encodings import EncodingSuite
from weft.testing.sources import SourceSuite
from weft.local import LocalHub
from weft.testing.stores import StoreSuite
from weft.testing.targets import TargetSuite
from weft.testing.transports import TransportSuite
"""
TRANSPORT = """
class Transport_{name}(TransportSuite):
    factory = "weft.testing.broken.transports:{plugin}"
    options = {{"hub": LocalHub()}}
    in_process = True
    seconds, short_seconds = {seconds}, 0.2
"""
STORE = """
class Store_{name}(StoreSuite):
    seconds = {seconds}

    @pytest.fixture
    def url(self, tmp_path):
        return f"{plugin}://{{tmp_path}}/store"
"""
ENCODING = """
class Encoding_{name}(EncodingSuite):
    name, dtypes, seconds = "{plugin}", (("float32", "bfloat16"),), {seconds}

    def reference(self, source, dtype):
        return source.to(dtype)
"""
SOURCE = """
class Source_{name}(SourceSuite):
    seconds = {seconds}

    @pytest.fixture
    def make(self):
        return lambda: sources.trainer("{plugin}")
"""
TARGET = """
class Target_{name}(TargetSuite):
    seconds = {seconds}

    @pytest.fixture
    def make(self):
        return lambda: targets.engine("{plugin}")
"""


SUITES: Mapping[str, tuple[str, Sequence[Fault]]] = {
    "Transport": (TRANSPORT, transports.FAULTS),
    "Store": (STORE, stores.FAULTS),
    "Source": (SOURCE, sources.FAULTS),
    "Target": (TARGET, targets.FAULTS),
    "Encoding": (ENCODING, encodings.FAULTS),
}


def class_of(suite: str, fault: Fault) -> str:
    return f"{suite}_{fault.plugin.replace('-', '_')}"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """By class, the error of the test that is to find its broken plug-in, without the source around it."""
    folder = tmp_path_factory.mktemp("broken")
    pairs = [(suite, fault) for suite, (_, faults) in SUITES.items() for fault in faults]
    classes = [
        SUITES[suite][0].format(name=fault.plugin.replace("-", "_"), plugin=fault.plugin, seconds=fault.seconds)
        for suite, fault in pairs
    ]
    (folder / "test_broken.py").write_text(HEAD + "".join(classes))
    kinds = " ".join(f"{suite}_*" for suite in SUITES)
    (folder / "pytest.ini").write_text(f"[pytest]\npython_classes = {kinds}\nmarkers =\n    trap(*numbers): covers\n")
    metadata = folder / "weft_broken-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: weft-broken\nVersion: 1\n")
    points = ["[weft.stores]", *(f"{scheme} = weft.testing.broken.stores:open_broken" for scheme in stores.KINDS)]
    broken = [(fault.plugin, fault.plugin.replace("-", "_")) for fault in encodings.FAULTS]
    points += ["[weft.encodings]", *(f"{name} = weft.testing.broken.encodings:{value}" for name, value in broken)]
    (metadata / "entry_points.txt").write_text("\n".join(points))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    tests = [f"test_broken.py::{class_of(suite, fault)}::{fault.test}" for suite, fault in pairs]
    # Broken plug-ins leave threads behind, which may abort an interpreter that ends in the ordinary way.
    run = "import os, sys, pytest; os._exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "-q", "--junitxml=result.xml", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, str] = defaultdict(str)
    for case in ElementTree.parse(folder / "result.xml").iter("testcase"):
        for failure in case.iter("failure"):
            found[case.get("classname", "").rpartition(".")[2]] += f"{failure.get('message')}\n"
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_fails_every_broken_plugin_for_its_own_reason(suite: str, said: Mapping[str, str]) -> None:
    faults = SUITES[suite][1]
    assert len(faults) >= 6
    assert len({(fault.test, fault.says) for fault in faults}) == len(faults)
    heard = {fault.plugin: (fault.says, said.get(class_of(suite, fault), "nothing: it passed")) for fault in faults}
    wrong = {plugin: pair for plugin, pair in heard.items() if pair[0] not in pair[1]}
    assert not wrong, f"{suite}: expected, and said: {wrong}"


class TestHonestSource(SourceSuite):
    """What the broken sources are made of keeps the contract."""

    @pytest.fixture
    def make(self) -> Callable[[], Trainer]:
        return lambda: sources.trainer("honest")


class TestHonestTarget(TargetSuite):
    """What the broken targets are made of keeps the contract."""

    @pytest.fixture
    def make(self) -> Callable[[], Engine]:
        return lambda: targets.engine("honest")


class Example(Suite):
    """A suite with one test that cannot pass."""

    @pytest.mark.trap(1)
    @pytest.mark.parametrize("n", [1, 2])
    def test_numbers(self, n: int) -> None:
        assert n == 0


def test_an_override_is_an_error_that_names_every_test() -> None:
    with pytest.raises(TypeError, match=r"Mine redefines tests .*: test_numbers \(not marked xfail\)\. Delete them"):

        class Mine(Example):
            def test_numbers(self, n: int) -> None: ...

    class Mixin:
        test_numbers = None

    with pytest.raises(TypeError, match="test_numbers"):

        class Mixed(Mixin, Example): ...

    with pytest.raises(TypeError, match=r"marked skip"):

        class Skips(Example):
            @pytest.mark.skip(reason="slow")
            def test_numbers(self, n: int) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({}, "without a reason"),
        ({"reason": " "}, "without a reason"),
        ({"reason": "slow", "run": False}, "not run"),
        ({"reason": "slow", "strict": False}, "not strict"),
    ],
)
def test_an_expected_failure_needs_a_reason_and_is_run(arguments: dict[str, Any], fault: str) -> None:
    with pytest.raises(TypeError, match=fault):

        class Mine(Example):
            @pytest.mark.xfail(**arguments)
            def test_numbers(self, n: int) -> None: ...


def test_an_expected_failure_runs_the_suites_own_test_strictly() -> None:
    class Mine(Example):
        @pytest.mark.xfail(reason="numbers are hard")
        def test_numbers(self) -> None: ...

    class Heir(Mine):
        def test_more(self) -> None: ...

    for kind in (Mine, Heir):
        assert kind.test_numbers is not Example.test_numbers
        with pytest.raises(AssertionError):
            kind().test_numbers(1)
        marks = {mark.name: mark.kwargs for mark in kind.test_numbers.pytestmark}  # type: ignore[attr-defined]
        assert set(marks) == {"trap", "parametrize", "xfail"}
        assert marks["xfail"] == {"reason": "numbers are hard", "strict": True}
    assert "xfail" not in {mark.name for mark in Example.test_numbers.pytestmark}  # type: ignore[attr-defined]


class Later(TransportSuite):
    @pytest.mark.xfail(reason="sends wait for one another until version 2")
    def test_both_directions_at_once(self) -> None: ...


def test_the_documentations_example_runs_the_suites_own_test() -> None:
    marks = {mark.name for mark in Later.test_both_directions_at_once.pytestmark}  # type: ignore[attr-defined]
    assert marks == {"xfail"}
    assert "crew" in inspect.signature(Later.test_both_directions_at_once).parameters


def test_a_call_that_does_not_end_is_an_error_that_says_which() -> None:
    with pytest.raises(AssertionError, match=r"a nap has not ended within 0\.1 s"):
        within(0.1, "a nap", threading.Event().wait)
    with pytest.raises(ZeroDivisionError):
        within(60, "a division", lambda: 1 // 0)
    assert within(60, "a sum", lambda: 1 + 1) == 2
