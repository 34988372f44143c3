"""Versions that land beside the weights that are served: those do not change until the replica has paused."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from threading import Barrier
from typing import Any

import pytest
import torch

from weft import shadow
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, RefitAbortedError
from weft.layout import Layout
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.shadow import Shadow, shadow_bytes
from weft.testing.job import BRISK, Job, Part, all_succeeded
from weft.testing.members import Hook, Log, MemoryControl, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

from .acts import trains

JOBS = count()
TINY = Tiny()
SHADOW = Policy(landing="shadow")
POLICIES = {
    "direct": SHADOW,
    "packed": Policy(landing="shadow", direct_run_bytes=1 << 40),
    "starved on host": Policy(
        landing="shadow_on_host", direct_run_bytes=1 << 40, staging_bytes=65_536, bucket_bytes=4096
    ),
    "relayed": Policy(landing="shadow", relay="host"),
}


class Replica:
    """Two targets with a control beside the second, which does not lead; one source. Versions 1, 2, …"""

    def __init__(
        self, url: str, *, policy: Policy = SHADOW, scratch_slots: int = 0, versions: int = 2,
        before: dict[str, Hook] | None = None, deadlines: Deadlines = BRISK,
    ) -> None:  # fmt: skip
        self.log, hooks = Log(), before or {}
        self.weights = [TINY.tensors(version) for version in range(versions + 1)]
        self.source = MemorySource("trainer/0", TINY.source(0, 1), log=self.log)
        self.targets = [
            MemoryTarget(
                f"rollout/{rank}", TINY.target(rank, 2, scratch_slots=scratch_slots), log=self.log,
                before=hooks.get(f"rollout/{rank}"),
            )
            for rank in range(2)
        ]  # fmt: skip
        self.control = MemoryControl("control", log=self.log, before=hooks.get("control"))
        self._job = Job(url, Expect(1, 1), policy=policy, name=f"shadow{next(JOBS)}", deadlines=deadlines)

    def run(self) -> dict[str, Any]:
        parts = [Part("trainer/0", self._train, source=self.source)]
        for target, control in zip(self.targets, (None, self.control), strict=True):
            parts.append(
                Part(
                    target.name, self._serve, target=target, replica="rollout", replica_size=2, control=control,
                    host="one",
                )
            )  # fmt: skip
        return self._job.run(parts)

    def _train(self, refit: Refit) -> list[Any]:
        return self._attempts(trains(self.source, self.weights[1:]), refit)

    def _attempts(self, act: Callable[[Refit], Any], refit: Refit) -> Any:
        return act(refit)

    def _serve(self, refit: Refit) -> list[Any]:
        return [refit.receive(version) for version in range(1, len(self.weights))]

    def holds(self, rank: int, version: int) -> bool:
        """Whether a target holds exactly a version."""
        return not mismatches(self.targets[rank].contents(), TINY.expected(rank, 2, self.weights[version]))


def memories(replica: Replica) -> list[torch.Tensor]:
    return [tensor.view(torch.uint8).clone() for target in replica.targets for tensor in target.memory().values()]


@pytest.mark.trap(28, 43, 67)
@pytest.mark.parametrize("scratch_slots", [0, 1])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_what_is_served_changes_only_while_paused(store_url: str, policy: Policy, scratch_slots: int) -> None:
    replica: Replica

    def before(what: str, argument: object) -> None:
        if what == "pause":  # every byte has come by now
            assert all(torch.equal(a, b) for a, b in zip(memories(replica), served, strict=True))
        elif what == "resume":
            version = argument
            assert isinstance(version, int)
            assert replica.holds(0, version)
            assert replica.holds(1, version)
            served[:] = memories(replica)
            for target in replica.targets:
                assert target.version == version

    replica = Replica(store_url, policy=policy, scratch_slots=scratch_slots, before={"control": before}, versions=3)
    served = memories(replica)
    results = replica.run()
    all_succeeded(results)
    assert replica.control.served == 3
    for member in ("rollout/0", "rollout/1"):
        for report in results[member]:
            assert report.seconds["install"] > 0
            assert 0 < report.seconds["pause"] < report.seconds["total"]
    changes = ("pause", "begin", "land", "prepare_commit", "commit", "resume")
    order = [what for _, what, _ in replica.log.entries(*changes)]
    assert order[: order.index("resume")].count("commit") == 2
    assert order.index("pause") < order.index("land")


def fails(what: str, argument: object) -> Hook:
    """Raises when a member is about to do that for the first time."""
    left = [1]

    def before(doing: str, about: object) -> None:
        if doing == what and about == argument and left[0]:
            left[0] -= 1
            raise RuntimeError("the engine's own words")

    return before


class Tolerant(Replica):
    """Goes on after a version that was given up."""

    def _serve(self, refit: Refit) -> list[Any]:
        return [self._attempt(refit.receive, version) for version in range(1, len(self.weights))]

    def _train(self, refit: Refit) -> list[Any]:
        return [self._attempt(self._offer(refit), version) for version in range(1, len(self.weights))]

    def _offer(self, refit: Refit) -> Callable[[int], Any]:
        def offer(version: int) -> Any:
            self.source.load(self.weights[version])
            made = refit.offer(version)
            made.released()
            return made.committed()

        return offer

    def _attempt(self, act: Callable[[int], Any], version: int) -> Any:
        try:
            return act(version)
        except RefitAbortedError as error:
            return error


@pytest.mark.trap(48)
def test_a_replica_that_cannot_pause_serves_its_old_version_on(store_url: str) -> None:
    served: list[int] = []

    def before(what: str, argument: object) -> None:
        pausing(what, argument)
        if what == "resume":
            served.append(int(str(argument)))
            assert replica.holds(0, served[-1])
            assert replica.holds(1, served[-1])

    pauses = count(1)

    def pausing(what: str, argument: object) -> None:
        if what == "pause" and next(pauses) == 2:
            raise RuntimeError("the engine's own words")

    replica = Tolerant(store_url, before={"control": before}, versions=3)
    results = replica.run()
    for errors in results.values():
        assert "the engine's own words" in str(errors[1])
    assert served == [1, 1, 3]
    assert not replica.control.refused
    assert replica.log.entries("abort", "refuse") == []
    assert replica.holds(0, 3)
    assert replica.holds(1, 3)


@pytest.mark.trap(48)
@pytest.mark.parametrize("culprit", ["rollout/0", "rollout/1"], ids=["leader", "member"])
@pytest.mark.parametrize(("what", "argument"), [("land", "layer1"), ("prepare_commit", 1)], ids=["install", "prepare"])
def test_a_replica_that_fails_while_it_takes_over_refuses_until_the_next(
    store_url: str, culprit: str, what: str, argument: object
) -> None:
    replica = Tolerant(store_url, before={culprit: fails(what, argument)})
    results = replica.run()
    assert all("the engine's own words" in str(result[0]) for result in results.values())
    (refused,) = replica.log.entries("refuse")
    assert culprit in str(refused[2])
    assert culprit in {member for member, *_ in replica.log.entries("abort")}
    assert replica.control.served == 2
    assert replica.holds(0, 2)
    assert replica.holds(1, 2)


def test_what_does_not_move_stays_as_it_is(store_url: str) -> None:
    replica = Replica(store_url, policy=Policy(landing="shadow", only=("*.gate", "1.*")), versions=1)
    before = [{name: tensor.clone() for name, tensor in t.memory().items()} for t in replica.targets]
    all_succeeded(replica.run())
    for rank, target in enumerate(replica.targets):
        wanted = TINY.expected(rank, 2, replica.weights[1])
        for name, tensor in target.memory().items():
            if name.startswith("layer1."):
                assert torch.equal(tensor, wanted[name])
            elif name.endswith("gate_up"):
                rows = len(tensor) // (2 * TINY.hidden) * TINY.hidden
                assert torch.equal(tensor[:rows], wanted[name][:rows])
                kept = tensor[rows : 2 * rows].view(torch.uint8)
                assert torch.equal(kept, before[rank][name][rows : 2 * rows].view(torch.uint8))
            else:
                assert torch.equal(tensor.view(torch.uint8), before[rank][name].view(torch.uint8))


def test_what_is_fetched_is_tended_until_the_replica_can_pause(store_url: str) -> None:
    replica = Replica(store_url, versions=1)
    looked: list[None] = []

    def serve(refit: Refit) -> None:
        Deadline.after(BRISK.offer).wait(lambda: refit.offered() == 1, "an offer", list)
        installation = refit.begin()
        installation.fetch(lambda: looked.append(None))
        installation.tend()
        assert not installation.touched
        installation.update()
        installation.commit()
        with pytest.raises(ConfigError, match="tend of version 1: it is installed, expected voted"):
            installation.tend()

    replica._serve = serve  # type: ignore[assignment, method-assign]
    all_succeeded(replica.run())
    assert looked
    assert replica.holds(0, 1)
    assert replica.holds(1, 1)


@pytest.mark.trap(48)
def test_a_version_that_is_withdrawn_before_the_pause_leaves_what_is_served_untouched(store_url: str) -> None:
    replica = Replica(store_url, versions=1)
    served, ready = memories(replica), Barrier(3)

    def train(refit: Refit) -> list[Any]:
        offer = refit.offer(1)
        offer.released()
        ready.wait(BRISK.move)
        offer.withdraw("thought better of it")
        return []

    def serve(refit: Refit) -> None:
        installation = refit.begin()
        installation.fetch()
        ready.wait(BRISK.move)

        def given_up() -> bool:
            installation.tend()
            return False

        with pytest.raises(RefitAbortedError, match="thought better of it"):
            Deadline.after(BRISK.move).wait(given_up, "the withdrawal", list)
        assert not installation.touched

    replica._serve, replica._train = serve, train  # type: ignore[assignment, method-assign]
    all_succeeded(replica.run())
    assert all(torch.equal(a, b) for a, b in zip(memories(replica), served, strict=True))


@pytest.mark.trap(48)
def test_a_withdrawal_that_is_there_already_is_heard_before_anything_is_paused(store_url: str) -> None:
    replica = Replica(store_url, versions=1)
    fetched, withdrawn = Barrier(3), Barrier(3)

    def train(refit: Refit) -> list[Any]:
        offer = refit.offer(1)
        offer.released()
        fetched.wait(BRISK.move)
        offer.withdraw("thought better of it")
        withdrawn.wait(BRISK.move)
        return []

    def serve(refit: Refit) -> None:
        installation = refit.begin()
        installation.fetch()
        fetched.wait(BRISK.move)
        withdrawn.wait(BRISK.move)
        with pytest.raises(RefitAbortedError, match="thought better of it"):
            installation.update()
        assert not installation.touched or refit.name != "rollout/0"  # the other one hears of it from this leader

    replica._serve, replica._train = serve, train  # type: ignore[assignment, method-assign]
    all_succeeded(replica.run())


@pytest.mark.trap(48)
def test_a_fetch_that_is_told_not_to_go_on_gives_the_version_up_everywhere(store_url: str) -> None:
    replica = Replica(store_url, versions=1)

    def stop() -> None:
        raise RuntimeError("the engine's own words")

    def serve(refit: Refit) -> None:
        installation = refit.begin()
        with pytest.raises(RefitAbortedError, match="the engine's own words"):
            installation.fetch(stop) if refit.name == "rollout/1" else installation.fetch()
        assert not installation.touched

    replica._serve = serve  # type: ignore[assignment, method-assign]
    assert "the engine's own words" in str(replica.run()["trainer/0"])


def test_fetch_is_for_shadows(store_url: str) -> None:
    replica = Replica(store_url, policy=Policy(), versions=1)

    def serve(refit: Refit) -> str:
        installation = refit.begin(1)
        with pytest.raises(ConfigError, match="its bytes land in weights that are served") as caught:
            installation.fetch()
        installation.update()
        installation.commit()
        return str(caught.value)

    replica._serve = serve  # type: ignore[assignment, method-assign]
    all_succeeded(replica.run())


def test_a_shadow_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layout: Layout = TINY.target(0, 1)
    target = MemoryTarget("rollout/0", layout)
    monkeypatch.setattr(shadow, "available_bytes", lambda device: shadow_bytes(layout) - 1)
    with pytest.raises(ConfigError, match=f"needs {shadow_bytes(layout)} bytes on cpu") as caught:
        Shadow(layout, target.memory(), SHADOW)
    assert 'use landing "in_place"' in str(caught.value)
    monkeypatch.setattr(shadow, "available_bytes", lambda device: shadow_bytes(layout))
    assert Shadow(layout, target.memory(), SHADOW).nbytes == shadow_bytes(layout)


@pytest.mark.trap(48)
def test_what_may_be_mixed_is_never_resumed(store_url: str) -> None:
    """Version 2 fails while it is taken over; in version 3 the replica cannot even pause."""
    left = [1]

    def before(what: str, argument: object) -> None:
        if (what, argument) == ("land", "layer1") and len(replica.log.entries("pause")) == 2 and left:
            left.clear()
            raise RuntimeError("half-way")

    def pausing(what: str, argument: object) -> None:
        if what == "pause" and len(replica.log.entries("pause")) == 2 and replica.log.entries("refuse"):
            raise RuntimeError("no pause")

    replica = Tolerant(store_url, before={"rollout/1": before, "control": pausing}, versions=3)
    results = replica.run()
    assert [isinstance(result, RefitAbortedError) for result in results["rollout/1"]] == [False, True, True]
    assert "half-way" in str(results["rollout/1"][1])
    assert "no pause" in str(results["rollout/1"][2])
    assert [version for _, _, version in replica.log.entries("resume")] == [1]
    assert replica.control.served is None
    assert "no pause" in replica.control.refused


def test_an_engine_serves_while_it_waits_for_an_offer(store_url: str) -> None:
    replica = Tolerant(store_url, policy=Policy(), versions=1)
    waited: list[int | None] = []
    hold = replica.source.hold

    def late(version: int) -> Any:
        time.sleep(0.3)  # the engine waits by now; if not, it serves as well
        waited.append(replica.control.served)
        return hold(version)

    replica.source.hold = late  # type: ignore[method-assign]
    all_succeeded(replica.run())
    assert waited == [-1]
    assert replica.control.served == 1
