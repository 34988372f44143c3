"""The orchestrator's side: it hears what members ask, and has the replicas' controls do it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

from weft.authentication import Secret
from weft.contracts import ReplicaControl
from weft.deadline import Deadline
from weft.errors import ConfigError, RecordError, WeftError
from weft.heartbeat import Heartbeat
from weft.job_store import JobStore
from weft.opened import Opened
from weft.orchestration.records import (
    REASON_CHARACTERS,
    Doing,
    Keys,
    Presence,
    ReplicaState,
    Request,
    What,
    presence_key,
)
from weft.stores import open_store

_LOG = logging.getLogger(__name__)
_NONCE_BYTES = 16
_LOOK_SECONDS = 60.0
"""A watch is asked anew so often."""
_END_SECONDS = 10.0


class Orchestrator(Opened):
    """Pauses, resumes and refuses for the replicas of a job, as their members ask (`RemoteControl`).

    It needs no weights and no accelerator, only the controls. Each replica has a thread of its own that waits for
    requests and calls its control, so a slow engine holds up no other. Whoever is started anew does what has been asked
    and not been answered, perhaps a second time: controls must not mind. What was paused stays paused until members of
    the replica ask for something else. One per job: where a second one comes, the first ends with `ConfigError`.

    Use it as a context manager, and `serve` in it.
    """

    def __init__(
        self, *, store: str, job: str, controls: Mapping[str, ReplicaControl], name: str = "orchestrator",
        lease_seconds: float = 15.0, open_seconds: float = 60.0, secret: Secret | bytes | str | None = None,
    ) -> None:  # fmt: skip
        """`controls` by replica. After `lease_seconds` without a sign of life, members take it for dead."""
        self.name = name
        self._url, self._job, self._open_seconds, self._lease_seconds = store, job, open_seconds, lease_seconds
        self._secret = secret if isinstance(secret, Secret | None) else Secret(secret)
        self._controls = dict(controls)
        self._states: dict[str, ReplicaState] = {}
        self._life = os.urandom(_NONCE_BYTES)
        self._records: JobStore | None = None
        self._heart: Heartbeat | None = None
        self._ended = threading.Event()
        self._errors: list[Exception] = []
        self._threads: list[threading.Thread] = []

    @property
    def states(self) -> Mapping[str, ReplicaState]:
        """What each replica does, and since which version. `replica_states` reads the same from the store."""
        return dict(self._states)

    def open(self) -> None:
        """Say that this orchestrator is there, and begin to hear requests. Raises `StoreError` and `RecordError`."""
        self._records = JobStore(open_store(self._url, Deadline.after(self._open_seconds)), self._job, self._secret)
        try:
            self._heart = Heartbeat(f"orchestrator {self.name}", may=self._may, failed=self._end)
            self._take_over()
            for replica in self._controls:
                self._hear(self._records, replica)
        except BaseException:
            self.close()
            raise

    def attend(self, replica: str, control: ReplicaControl) -> None:
        """Have a control of one more replica, or another control of one. Raises `ConfigError` before `open`."""
        if self._records is None:
            raise ConfigError("the orchestrator is not open: use `with Orchestrator(...) as orchestrator`")
        known = replica in self._controls
        self._controls[replica] = control
        if not known:
            self._take_over()
            self._hear(self._records, replica)

    def serve(self) -> None:
        """Wait until another thread calls `close`. Raises what ended this orchestrator: `StoreError`, for one."""
        self._ended.wait()
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """Hear nothing more; replicas stay as they are. A control that is at work gets 10 s to end. Idempotent."""
        self._ended.set()
        records, self._records = self._records, None
        if records is not None:
            if self._heart is not None:
                self._heart.end()
            records.store.close()
        deadline = Deadline.after(_END_SECONDS)
        for thread in self._threads:
            thread.join(deadline.remaining())

    def _hear(self, records: JobStore, replica: str) -> None:
        key = Keys.of(records, replica).state
        self._states[replica] = records.find("state", key, ReplicaState) or ReplicaState()
        self._start(replica, self._attend, records, replica)

    def _start(self, name: str, run: object, *arguments: object) -> None:
        def go() -> None:
            try:
                run(*arguments)  # type: ignore[operator]
            except WeftError as error:
                self._end(error)

        self._threads.append(threading.Thread(target=go, name=f"orchestration of {name}", daemon=True))
        self._threads[-1].start()

    def _end(self, error: WeftError) -> None:
        if not self._ended.is_set():
            _LOG.error("the orchestrator ends: %s", error)
            self._errors.append(error)
            self._ended.set()

    def _take_over(self) -> None:
        records, heart = self._records, self._heart
        assert records is not None, "it is open"
        assert heart is not None, "it is open"
        mine = Presence(self.name, self._life, tuple(sorted(self._controls)))
        heart.hold(lambda: records.lease("orchestrator", presence_key(records), mine, self._lease_seconds))

    def _may(self) -> None:
        """Take a lost lease again: not when another orchestrator has it. Raises `ConfigError`."""
        if (records := self._records) is None:
            return
        found = records.find("orchestrator", presence_key(records), Presence)
        if found is not None and found.life != self._life:
            raise ConfigError(
                f"orchestrator {found.name} has taken the place of {self.name} in job {self._job!r}: "
                "a job has one orchestrator"
            )

    def _touch(self, seconds: float) -> None:
        """This orchestrator is there as long as any replica's requests are heard, or answered in time."""
        if self._heart is not None:
            self._heart.touch(seconds + 2 * _LOOK_SECONDS)

    def _attend(self, records: JobStore, replica: str) -> None:
        """Do what the members of one replica ask, one request after the other."""
        keys, known = Keys.of(records, replica), None
        while not self._ended.is_set():
            self._touch(0)
            data = records.store.watch(keys.request, known, Deadline.after(_LOOK_SECONDS))
            if data == known or data is None or self._ended.is_set():
                continue
            known = data
            try:
                request = records.opened("request", keys.request, Request, data)
            except RecordError as error:
                _LOG.warning("somebody asks for something who may not: %s", error)
                continue
            if request.number > self._states[replica].answered:
                self._touch(request.seconds)
                self._states[replica] = state = self._answer(replica, request)
                records.put("state", keys.state, state)
                _LOG.info("replica %s: %s: %s", replica, request.what.value, state)

    def _answer(self, replica: str, request: Request) -> ReplicaState:
        """What the replica does afterwards."""
        version = self._states[replica].version
        try:
            doing = _perform(self._controls[replica], request)
        except Exception as error:  # noqa: BLE001  # the member raises it
            words = f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]
            return ReplicaState(request.number, Doing.UNKNOWN, version, error=words)
        version = request.version if request.what is What.RESUME else version
        return ReplicaState(request.number, doing, version, request.reason)


def _perform(control: ReplicaControl, request: Request) -> Doing:
    match request.what:
        case What.PAUSE:
            control.pause(request.mode, Deadline.after(request.seconds))
            return Doing.PAUSED
        case What.RESUME:
            if request.forget:
                control.invalidate_caches(request.version)
            control.resume(request.version)
            return Doing.SERVING
        case What.REFUSE:
            control.refuse(request.reason)
            return Doing.REFUSING
