"""A whole job in one process: every member a thread with a `Refit` of its own, over the transport `local`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.authentication import Secret
from weft.contracts import ReplicaControl, Source, Target
from weft.deadline import Deadlines
from weft.local import LocalHub
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.testing.faults import Script

BRISK = Deadlines(rendezvous=30, offer=30, begin=30, move=30, vote=30, commit=30)
"""For jobs that must succeed: long enough for a busy machine, short enough for a test."""


@dataclass(frozen=True, slots=True)
class Part:
    """One member and what it does once it has joined."""

    name: str
    act: Callable[[Refit], Any]
    source: Source | None = None
    control: ReplicaControl | None = None
    target: Target | None = None
    replica: str | None = None
    replica_size: int = 1
    host: str | None = None
    """Where it says that it runs; None for this machine."""
    script: Script | None = None
    """With one, its transport is `faulty`."""


@dataclass(slots=True)
class Job:
    """What all members of a job have in common."""

    store: str
    """URL."""
    expect: Expect
    policy: Policy = field(default_factory=Policy)
    deadlines: Deadlines = BRISK
    name: str = "job"
    hub: LocalHub = field(default_factory=LocalHub)
    secret: Secret | None = None

    def run(self, parts: Sequence[Part], seconds: float = 60.0) -> dict[str, Any]:
        """Start every member in a thread; by name, what its `act` returned or the exception that ended it.

        Raises `AssertionError` naming members that have not ended in time: no wait may be without an end.
        """
        results: dict[str, Any] = {}
        threads = [
            threading.Thread(target=self._play, args=(part, results), name=part.name, daemon=True) for part in parts
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        stuck = [thread.name for thread in threads if thread.is_alive()]
        assert not stuck, f"still running after {seconds} s: {', '.join(stuck)}; ended: {results}"
        return results

    def refit(self, part: Part) -> Refit:
        """The member's handle, not open yet."""
        options: dict[str, Any] = {"hub": self.hub}
        if part.script is not None:
            options = {"transport": "local", "transport_options": options, "script": part.script}
        return Refit(
            source=part.source, target=part.target, control=part.control,
            transport="local" if part.script is None else "faulty", transport_options=options, store=self.store,
            job=self.name, name=part.name, replica=part.replica, replica_size=part.replica_size, expect=self.expect,
            deadlines=self.deadlines, policy=self.policy, host=part.host, secret=self.secret,
        )  # fmt: skip

    def _play(self, part: Part, results: dict[str, Any]) -> None:
        try:
            with self.refit(part) as refit:
                results[part.name] = part.act(refit)
        except Exception as error:  # noqa: BLE001  # the test asks for it
            results[part.name] = error


def all_succeeded(results: Mapping[str, Any]) -> None:
    """Raise the exceptions among what `Job.run` gave, as one `ExceptionGroup`, with their traces."""
    if failed := [result for result in results.values() if isinstance(result, Exception)]:
        raise ExceptionGroup("members failed", failed)
