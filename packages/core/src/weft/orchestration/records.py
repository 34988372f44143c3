"""What an orchestrator and the members of replicas write for each other. Keys, below `weft/<job>/orchestration/`:

- `orchestrator`: who orchestrates, a lease;
- `requests/<replica>`: counter of requests; `request/<replica>`: the newest one, which replaces those before it;
- `state/<replica>`: the last request that was answered, and what the replica does since.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated
from urllib.parse import quote, unquote

import msgspec

from weft.authentication import Secret
from weft.deadline import Deadline
from weft.job_store import JobStore
from weft.stores import open_store

REASON_CHARACTERS = 20_000
"""Longer reasons are cut, here as in the rendezvous."""


class What(StrEnum):
    """What a member asks for: see `weft.contracts.ReplicaControl`."""

    PAUSE = "pause"
    RESUME = "resume"
    REFUSE = "refuse"


class Request(msgspec.Struct, frozen=True, array_like=True):
    """What is to be done with a replica. New fields go to the end, with defaults."""

    number: int
    """Grows with every request of the replica."""
    what: What
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    """How long the member waits for the answer."""
    mode: str = ""
    """Of `pause`."""
    version: int = -1
    """Of `resume`."""
    forget: bool = False
    """Of `resume`: whether caches are to be invalidated first."""
    reason: str = ""
    """Of `refuse`."""


class Doing(StrEnum):
    """What a replica does, as far as its orchestrator knows."""

    UNKNOWN = "unknown"
    """Nothing was asked yet, or the last request failed."""
    SERVING = "serving"
    PAUSED = "paused"
    REFUSING = "refusing"


class ReplicaState(msgspec.Struct, frozen=True, array_like=True):
    """A replica as its orchestrator knows it. New fields go to the end, with defaults."""

    answered: int = 0
    """Number of the last request that was answered."""
    doing: Doing = Doing.UNKNOWN
    version: int | None = None
    """The version that it resumed with last."""
    reason: str = ""
    """Why it refuses."""
    error: str = ""
    """Why the last request failed; empty when it did not."""

    def __str__(self) -> str:
        last = "" if self.version is None else f", version {self.version} last"
        return f"{self.doing.value}{last}{self.reason and f': {self.reason}'}{self.error and f': {self.error}'}"


class Presence(msgspec.Struct, frozen=True, array_like=True):
    """That somebody orchestrates. New fields go to the end, with defaults."""

    name: str
    life: bytes
    """Random, of this life of the orchestrator."""
    replicas: tuple[str, ...]
    """Whose controls it has."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Where a replica's records are."""

    requests: str
    request: str
    state: str

    @classmethod
    def of(cls, records: JobStore, replica: str) -> Keys:
        """Of one replica of a job."""
        name = quote(replica, safe="")
        return cls(*(f"{records.root}/orchestration/{kind}/{name}" for kind in ("requests", "request", "state")))


def presence_key(records: JobStore) -> str:
    """Where the orchestrator's lease is."""
    return f"{records.root}/orchestration/orchestrator"


def replica_states(
    store: str, job: str, deadline: Deadline, secret: Secret | bytes | str | None = None
) -> dict[str, ReplicaState]:
    """What each replica of a job does, for anybody who can reach the store at this URL and knows the job's secret."""
    opened = open_store(store, deadline)
    try:
        records = JobStore(opened, job, secret if isinstance(secret, Secret | None) else Secret(secret))
        prefix = f"{records.root}/orchestration/state/"
        found = {key: records.find("state", key, ReplicaState) for key in opened.keys(prefix)}
        return {unquote(key.removeprefix(prefix)): state for key, state in found.items() if state is not None}
    finally:
        opened.close()
