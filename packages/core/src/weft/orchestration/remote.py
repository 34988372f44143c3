"""The member's side: a replica control that asks an orchestrator."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from weft.authentication import Secret
from weft.deadline import Deadline
from weft.errors import DeadlineError, PeerLostError, WeftError
from weft.job_store import JobStore
from weft.orchestration.records import REASON_CHARACTERS, Keys, Presence, ReplicaState, Request, What, presence_key
from weft.stores import open_store

_LOOK_SECONDS = 5.0
"""Between looks whether the orchestrator is still there, while it does not answer."""


class ControlError(WeftError):
    """The orchestrator could not do what a member asked for; the message has the words of the replica's control."""


class RemoteControl:
    """`weft.contracts.ReplicaControl` of a replica whose engine only the job's orchestrator can reach.

    Every call blocks until the orchestrator has answered, at most `seconds`, or until the deadline of `pause`: then it
    raises `DeadlineError` that names the orchestrator. Without an orchestrator that has this replica it raises
    `PeerLostError` at once; `ControlError` says why the control failed there. For one thread, and one member of a
    replica: the others have none.
    """

    def __init__(
        self, *, store: str, job: str, replica: str, seconds: float = 60.0, secret: Secret | bytes | str | None = None
    ) -> None:
        """`job` as the orchestrator has it; of a fleet, the fleet's. Connects when it is first needed."""
        self.replica = replica
        self._url, self._job, self._seconds = store, job, seconds
        self._secret = secret if isinstance(secret, Secret | None) else Secret(secret)
        self._records: JobStore | None = None
        self._known: bytes | None = None
        """The state as it was seen last."""
        self._served: int | None = None
        """The version that is served, as far as this control knows."""
        self._forget = False

    def __enter__(self) -> RemoteControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store. What is paused stays paused. Idempotent."""
        if self._records is not None:
            self._records.store.close()
            self._records = None

    def pause(self, mode: str, deadline: Deadline) -> None:
        """See `ReplicaControl.pause`. When that fails, a replica that served a whole version is asked to go on with it;
        another one may be left paused.
        """
        who = self._orchestrator(deadline)
        served, self._served = self._served, None
        try:
            self._wait(self._post(deadline, What.PAUSE, mode=mode), deadline, who)
        except WeftError:
            if served is not None:
                self._post(deadline, What.RESUME, version=served)
                self._served = served
            raise

    def invalidate_caches(self, version: int) -> None:
        """Asked for together with `resume`, which raises if it fails."""
        self._forget = True

    def resume(self, version: int) -> None:
        """See `ReplicaControl.resume`."""
        forget, self._forget = self._forget, False
        deadline = Deadline.after(self._seconds)
        who = self._orchestrator(deadline)
        self._wait(self._post(deadline, What.RESUME, version=version, forget=forget), deadline, who)
        self._served = version

    def refuse(self, reason: str) -> None:
        """See `ReplicaControl.refuse`. The request stays in the store: an orchestrator that comes later hears it."""
        self._served, self._forget = None, False
        deadline = Deadline.after(self._seconds)
        request = self._post(deadline, What.REFUSE, reason=reason[:REASON_CHARACTERS])
        self._wait(request, deadline, self._orchestrator(deadline))

    def _opened(self, deadline: Deadline) -> JobStore:
        if self._records is None:
            self._records = JobStore(open_store(self._url, deadline), self._job, self._secret)
        return self._records

    def _post(self, deadline: Deadline, what: What, **rest: Any) -> Request:
        """Ask, in place of whatever was asked before."""
        records = self._opened(deadline)
        keys = Keys.of(records, self.replica)
        request = Request(records.store.add(keys.requests, 1), what, deadline.remaining(), **rest)
        records.put("request", keys.request, request)
        return request

    def _wait(self, request: Request, deadline: Deadline, who: str) -> None:
        """Wait for the answer of the orchestrator of this name, or another one in its place."""
        records, what = self._opened(deadline), f"{request.what.value} of replica {self.replica}"
        key = Keys.of(records, self.replica).state
        while True:
            before, limit = self._known, Deadline.after(min(_LOOK_SECONDS, deadline.remaining()))
            self._known = records.store.watch(key, before, limit)
            state = ReplicaState() if self._known is None else records.opened("state", key, ReplicaState, self._known)
            if state.answered >= request.number:
                break
            if deadline.expired():
                raise DeadlineError(what, deadline.seconds, [f"orchestrator {who}"])
            if self._known == before:
                who = self._orchestrator(deadline)
        if state.answered > request.number:
            raise ControlError(f"{what}: another control of it has asked for something else since: it has one")
        if state.error:
            raise ControlError(f"orchestrator {who}: {what}: {state.error}")

    def _orchestrator(self, deadline: Deadline) -> str:
        """Its name. Raises `PeerLostError` when there is none for this replica."""
        records = self._opened(deadline)
        found = records.find("orchestrator", presence_key(records), Presence)
        if found is None:
            raise PeerLostError(f"the orchestrator of job {self._job!r}", "it gives no sign of life: start it (again)")
        if self.replica not in found.replicas:
            raise PeerLostError(
                f"orchestrator {found.name} of job {self._job!r}",
                f"it has no control of replica {self.replica}, only of {', '.join(found.replicas) or 'none'}",
            )
        return found.name
