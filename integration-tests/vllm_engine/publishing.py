"""The part of `refit_case.py` in which versions are published: the engine reads them, and somebody reads from it."""

from __future__ import annotations

from typing import Any

import msgspec
from safetensors.torch import load_file
from sources import CheckpointSource

from weft.deadline import Deadlines
from weft.policy import Policy
from weft.publication import Publisher, Subscriber
from weft.testing.members import MemoryTarget


def publish(case: Any) -> dict[str, Any]:
    """Models "B" and "C" as versions 1 and 2; the trainer goes, and a late one gets version 2 from the engine."""
    common: dict[str, Any] = {
        "store": case.init["store"], "job": "published", "transport": case.init["transport"],
        "deadlines": Deadlines(**case.init["deadlines"]), "policy": msgspec.convert(case.policy, Policy),
    }  # fmt: skip
    found: dict[str, Any] = {"gaps": []}
    source = CheckpointSource(case.weights("B"), 0, 1)
    with Publisher(source=source, rank=0, members=1, name="trainer/0", **common) as publisher:
        publisher.publish(1)
        init = {key: value for key, value in case.init.items() if key != "sources"}
        init |= {"job": "published", "policy": {**case.policy, "drive": "published"}, "relay": True}
        case.llm.init_weight_transfer_engine({"init_info": init})
        for version, name in ((1, "B"), (2, "C")):
            source.load(case.weights(name))
            if version > 1:
                publisher.publish(version)
            source.load(case.weights("A"))  # the weights go on changing
            report = case.control.refit(version)
            found["gaps"] += case.gaps(name)
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
