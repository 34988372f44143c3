"""What members run on: found out without fail, told to everybody, and missing in what older members say."""

from __future__ import annotations

import platform
from importlib import metadata
from itertools import count
from typing import Any

import msgspec
import pytest
import torch

from weft.facts import Facts, facts_of
from weft.refit import Refit
from weft.roster import Expect, MemberRecord
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny

JOBS = count()


class Framed(MemorySource):
    framework = ("some-trainer", "1.2")


class Engine(MemoryTarget):
    framework = ("some-engine", "3.4")


def test_facts_are_those_of_this_process() -> None:
    found = facts_of(torch.device("cpu"), Engine("engine", Tiny().target(0, 1)), object(), None)
    assert found.weft == metadata.version("weft-core")
    assert found.python == platform.python_version()
    assert found.torch == torch.__version__
    assert found.frameworks == {"some-engine": "3.4"}
    assert found.architecture == ""
    assert str(found).startswith(f"some-engine 3.4, weft {found.weft}, torch {found.torch}")
    assert str(Facts()) == ""


def test_what_cannot_be_found_out_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> Any:
        raise metadata.PackageNotFoundError("weft-core")

    def without_driver(*_: object) -> Any:
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", without_driver)
    found = facts_of(torch.device("cuda:0"))
    assert (found.weft, found.architecture, found.cuda) == ("", "", "13.0")


def test_the_architecture_is_that_of_the_gpu_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    assert facts_of(torch.device("cuda:3")).architecture == "sm_93"


def test_every_member_knows_what_everybody_runs_on(store_url: str) -> None:
    tiny = Tiny(layers=1)
    source = Framed("trainer", tiny.source(0, 1))
    target, both = Engine("rollout", tiny.target(0, 1)), Engine("both", tiny.target(0, 1))

    def facts(refit: Refit) -> Any:
        return refit.facts

    job = Job(store_url, Expect(1, 2), name=f"facts{next(JOBS)}")
    results = job.run(
        [
            Part("trainer", facts, source=source, target=both, replica="r1"),
            Part("rollout", facts, target=target, replica="r2"),
        ]
    )
    all_succeeded(results)
    here = facts_of(torch.device("cpu"))
    expected = {
        "rollout": msgspec.structs.replace(here, frameworks={"some-engine": "3.4"}),
        "trainer": msgspec.structs.replace(here, frameworks={"some-trainer": "1.2", "some-engine": "3.4"}),
    }
    assert results == {"trainer": expected, "rollout": expected}


def test_a_record_without_facts_has_empty_ones() -> None:
    fields: list[Any] = [["m", None, None, None, 0, "h", "d", "cpu"], b"", "0.1.0", 3, 1, 1]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=MemberRecord).facts == Facts()
