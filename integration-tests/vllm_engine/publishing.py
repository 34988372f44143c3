"""The part of `refit_case.py` in which versions are published: the engine reads them, and somebody reads from it."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from safetensors.torch import load_file
from sources import CheckpointSource
from target_case import compare

from weft.deadline import Deadlines
from weft.policy import Policy
from weft.publication import Publisher, Subscriber
from weft.testing.members import MemoryTarget

SECONDS = 90.0
"""For what happens in another thread or process."""


def publish(case: Any) -> dict[str, Any]:
    """In place and then in shadow memory; the engine serves "A" before, and "C" after each."""
    return {
        "in_place": _published(case, "in_place", "A"),
        "shadow": _published(case, "shadow", "C"),
    }


def _published(case: Any, landing: str, serves: str) -> dict[str, Any]:
    """Models "B" and "C" as versions 1 and 2; the trainer goes, and a late one gets version 2 from the engine."""
    policy = {**case.policy, "landing": landing}
    common: dict[str, Any] = {
        "store": case.init["store"], "job": f"published {landing}", "transport": case.init["transport"],
        "deadlines": Deadlines(**case.init["deadlines"]), "policy": msgspec.convert(policy, Policy),
    }  # fmt: skip
    found: dict[str, Any] = {"gaps": [], "before": [], "memory": []}
    source = CheckpointSource(case.weights("B"), 0, 1)
    with Publisher(source=source, rank=0, members=1, name="trainer/0", **common) as publisher:
        publisher.publish(1)
        init = {key: value for key, value in case.init.items() if key != "sources"}
        init |= {"job": common["job"], "policy": {**policy, "drive": "published"}, "relay": True}
        case.llm.init_weight_transfer_engine({"init_info": init})
        for version, name in ((1, "B"), (2, "C")):
            source.load(case.weights(name))
            if version > 1:
                publisher.publish(version)
            source.load(case.weights("A"))  # the weights go on changing
            if landing == "shadow":
                found["before"] += _serves_until_ready(case, version, serves)
                found["memory"] += _memory(case, serves)
            report = case.control.refit(version)
            found["gaps"] += case.gaps(name)
            found["memory"] += _memory(case, name)
            serves = name
    found["digest"], found["version"] = report.digest, report.version
    target = MemoryTarget("late/0", source.layout())
    target.poison()
    with Subscriber(target=target, replica="late", name="late/0", **common) as late:
        read = late.receive()
        found["late"] = {"digest": read.digest, "version": read.version, "holder": late.holder}
    saved, held = load_file(case.weights("C")), target.contents()
    found["late"]["wrong"] = [name for name in held if not held[name].equal(saved[name].flatten())]
    found["late"]["compared"] = len(held)
    return found


def _serves_until_ready(case: Any, version: int, name: str) -> list[float]:
    """How far tokens are from those of a model until the engine has fetched a version, and right after."""
    found: list[float] = []
    limit = time.monotonic() + SECONDS
    while case.control.ready() != version:
        assert time.monotonic() < limit, f"version {version} is not ready within {SECONDS} s"
        found += case.gaps(name)
    return found + case.gaps(name)


def _memory(case: Any, name: str) -> list[dict[str, Any]]:
    config = case.models[name].config.to_dict()
    compared: list[dict[str, Any]] = case.llm.collective_rpc(compare, args=(str(case.directory / name), config))
    return compared
