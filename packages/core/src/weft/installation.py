"""`Installation`: a version as one target sees it, from begun to committed."""

from __future__ import annotations

import time
from collections.abc import Callable

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, RefitAbortedError
from weft.loop import Account, Loop
from weft.protocol.target import Stage
from weft.report import Report
from weft.session import TargetSession


class Installation:
    """A version on its way into this target. Made by `Refit.begin`: from then on the target may be written."""

    def __init__(
        self, loop: Loop, session: TargetSession, deadlines: Deadlines, account: Account, buckets: int, segments: int
    ) -> None:
        self._loop, self._session, self._deadlines, self._account = loop, session, deadlines, account
        self._buckets, self._segments = buckets, segments
        self._paused_seconds = time.perf_counter()  # by now where bytes land in weights that are served

    @property
    def version(self) -> int:
        """The version."""
        return self._session.version

    @property
    def state(self) -> Stage:
        """How far this target is with it."""
        return self._session.stage

    @property
    def touched(self) -> bool:
        """Whether weights that are served may have changed, here or at another member: after a failure the replica
        must then refuse to serve; otherwise it may go on with its old version.
        """
        return self._session.touched

    def fetch(self, go_on: Callable[[], None] = lambda: None) -> None:
        """Take every byte beside the weights that are served, verify, and vote: returns once all members have, and the
        replica may be paused for `update`. Only where the policy lands in shadow memory.

        `go_on` is called again and again meanwhile; what it raises gives the version up. Raises `RefitAbortedError` on
        every member of the replica when any of them cannot.
        """
        self._expect(Stage.BEGUN, "fetch")
        if not self._session.shadow:
            raise ConfigError(
                f"fetch of version {self.version}: its bytes land in weights that are served; pause the replica, then "
                "begin and update, or use landing shadow"
            )
        try:
            self._fetch(Stage.VOTED, go_on)
        except BaseException as error:
            raise self.failed(error) from error

    def _fetch(self, voted: Stage, go_on: Callable[[], None] = lambda: None) -> None:
        deadlines = self._deadlines
        self._until(Stage.VERIFIED, Deadline.after(deadlines.begin + deadlines.move), "move", go_on)
        self._until(voted, Deadline.after(deadlines.move + deadlines.vote), "vote", go_on)

    def tend(self) -> None:
        """Take in what others say, without waiting: to be called now and then between `fetch` and `update`.

        Raises `RefitAbortedError` when the version has been given up meanwhile: nothing that is served has changed.
        """
        self._expect(Stage.VOTED, "tend")
        try:
            self._loop.wire.pump()
            self._session.step()
        except BaseException as error:
            raise self.failed(error) from error

    def update(self) -> None:
        """Take every byte, verify, vote, and prepare the commit: returns once every member of the replica has prepared.
        After `fetch` only what is left of it: take the shadow over, and prepare.

        Raises `RefitAbortedError` on every member of the replica when any of them cannot; the target has then been
        aborted and may hold a mixture: the replica must refuse to serve.
        """
        session, deadlines = self._session, self._deadlines
        if session.shadow and session.stage is Stage.BEGUN:
            self.fetch()
        self._expect(Stage.VOTED if session.shadow else Stage.BEGUN, "update")
        try:
            if session.shadow:
                self._loop.wire.pump()
                session.step()  # lest a version that has been given up meanwhile make the replica refuse
                self._paused_seconds = time.perf_counter()
                session.pause()
                self._until(Stage.CLEARED, Deadline.after(deadlines.begin + deadlines.vote), "pause")
            else:
                self._fetch(Stage.CLEARED)
            session.prepare()
            self._until(Stage.DECIDED, Deadline.after(deadlines.move + deadlines.vote), "vote")
        except BaseException as error:
            raise self.failed(error) from error

    def commit(self) -> Report:
        """Install the version, after `update`; returns once all members of the replica have, and it may serve.

        Raises `RefitAbortedError` when one of them is lost before it has: the replica must refuse to serve.
        """
        self._expect(Stage.DECIDED, "commit")
        session = self._session
        try:
            session.commit()
            # The leader waits for members, and members for the leader: it is the one to say who is late.
            patience = self._deadlines.commit if session.leader is not None else 2 * self._deadlines.commit
            self._until(Stage.INSTALLED, Deadline.after(patience), "commit")
        except BaseException as error:
            raise self.failed(error) from error
        seconds = self._account.seconds(session.clock.seconds)
        seconds["pause"] = time.perf_counter() - self._paused_seconds
        return Report(
            version=self.version, digest=session.digest, digested_by=self._account.digested_by,
            bytes=session.receiver.nbytes, seconds=seconds, buckets=self._buckets, segments=self._segments,
            registrations=0, allocations=0, store_operations=self._account.store_operations(),
            relayed_bytes=session.relay.nbytes, events=tuple(session.events),
        )  # fmt: skip

    def abort(self, error: BaseException) -> None:
        """Give the version up on every member of the replica. Idempotent; a committed version stays."""
        self._session.abort(error)

    def _expect(self, stage: Stage, what: str) -> None:
        if self.state is not stage:
            raise ConfigError(
                f"{what} of version {self.version}: it is {self.state}, expected {stage} "
                "(begin, update and commit are called once each, in this order)"
            )

    def _until(self, stage: Stage, limit: Deadline, what: str, go_on: Callable[[], None] = lambda: None) -> None:
        session, order = self._session, list(Stage)

        def step() -> None:
            go_on()
            session.step()

        self._loop.until(
            lambda: order.index(session.stage) >= order.index(stage),
            step,
            limit,
            f"{what} of version {self.version}",
            session.waiting_for,
        )

    def failed(self, error: BaseException) -> BaseException:
        """Abort; returns what to raise: a `RefitAbortedError`, unless it is no error but an interruption."""
        self._session.abort(error)
        if isinstance(error, RefitAbortedError) or not isinstance(error, Exception):
            return error
        return RefitAbortedError(self.version, [f"{self._loop.wire.me.name}: {type(error).__name__}: {error}"])
