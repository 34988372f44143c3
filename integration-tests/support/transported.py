"""Jobs of threads whose members move over any transport."""

from __future__ import annotations

from dataclasses import dataclass

from weft import Refit
from weft.testing.job import Job, Part


@dataclass(slots=True)
class Over(Job):
    """A job of threads over any transport."""

    transport: str = "local"

    def refit(self, part: Part) -> Refit:
        options = {"hub": self.hub} if self.transport == "local" else {}
        return Refit(
            source=part.source, target=part.target, transport=self.transport, transport_options=options,
            store=self.store, job=self.name, name=part.name, replica=part.replica, expect=self.expect,
            deadlines=self.deadlines, policy=self.policy,
        )  # fmt: skip
