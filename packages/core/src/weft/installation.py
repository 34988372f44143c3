"""`Installation`: a version as one target sees it, from begun to committed."""

from __future__ import annotations

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, RefitAbortedError
from weft.loop import Account, Loop
from weft.report import Report
from weft.session import TargetSession


class Installation:
    """A version on its way into this target. Made by `Refit.begin`: from then on the target may be written."""

    def __init__(
        self, loop: Loop, session: TargetSession, deadlines: Deadlines, account: Account, buckets: int, segments: int
    ) -> None:
        self._loop, self._session, self._deadlines, self._account = loop, session, deadlines, account
        self._buckets, self._segments = buckets, segments

    @property
    def version(self) -> int:
        """The version."""
        return self._session.version

    @property
    def state(self) -> str:
        """`begun`, `verified`, `prepared`, `decided`, `committed` or `aborted`."""
        return self._session.state

    def update(self) -> None:
        """Take every byte, verify, vote, and prepare the commit: returns once every member of the replica has prepared.

        Raises `RefitAbortedError` on every member of the replica when any of them cannot; the target has then been
        aborted and may hold a mixture: the replica must refuse to serve.
        """
        if self.state != "begun":
            raise ConfigError(f"update of version {self.version}: it is {self.state}, expected begun")
        session, deadlines = self._session, self._deadlines
        move = Deadline.after(deadlines.begin + deadlines.move)
        try:
            self._loop.until(
                lambda: session.state != "begun",
                session.step,
                move,
                f"move of version {self.version}",
                session.waiting_for,
            )
            vote = Deadline.after(deadlines.move + deadlines.vote)
            self._loop.until(
                lambda: session.state == "decided",
                session.step,
                vote,
                f"vote on version {self.version}",
                session.waiting_for,
            )
        except BaseException as error:
            raise self.failed(error) from error

    def commit(self) -> Report:
        """Install the version: local, after `update`. The replica's leader waits for all members and records the
        outcome.
        """
        if self.state != "decided":
            raise ConfigError(
                f"commit of version {self.version}: it is {self.state}, expected decided (call update first)"
            )
        session, leader = self._session, self._session.leader
        session.commit()
        if leader is not None:
            limit = Deadline.after(self._deadlines.commit)
            self._loop.until(
                lambda: leader.ended, leader.step, limit, f"commit of version {self.version}", session.waiting_for
            )
            if not leader.committed:
                raise RefitAbortedError(self.version, leader.reasons)
        return Report(
            version=self.version, digest=session.digest, bytes=session.receiver.nbytes,
            seconds=self._account.seconds(session.clock.seconds), buckets=self._buckets, segments=self._segments,
            registrations=0, allocations=0, store_operations=self._account.store_operations(),
            relayed_bytes=session.relay.nbytes, events=tuple(session.events),
        )  # fmt: skip

    def abort(self, error: BaseException) -> None:
        """Give the version up on every member of the replica. Idempotent; a committed version stays."""
        self._session.abort(error)

    def failed(self, error: BaseException) -> BaseException:
        """Abort; returns what to raise: a `RefitAbortedError`, unless it is no error but an interruption."""
        self._session.abort(error)
        if isinstance(error, RefitAbortedError) or not isinstance(error, Exception):
            return error
        return RefitAbortedError(self.version, [f"{self._loop.wire.me.name}: {type(error).__name__}: {error}"])
