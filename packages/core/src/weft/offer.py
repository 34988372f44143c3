"""`Offer`: a version as its sources see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, RefitAbortedError, WeftError
from weft.loop import Account, Loop
from weft.report import Report
from weft.session import SourceSession


class Offer:
    """A version that this source offers. Made by `Refit.offer`; everything happens inside its calls and those of its
    `Refit`.
    """

    def __init__(
        self, loop: Loop, session: SourceSession, deadlines: Deadlines, account: Account, buckets: int, segments: int
    ) -> None:
        self._loop, self._session, self._deadlines, self._account = loop, session, deadlines, account
        self._buckets, self._segments = buckets, segments
        loop.offered = session

    @property
    def version(self) -> int:
        """The version."""
        return self._session.version

    @property
    def is_released(self) -> bool:
        """Whether the weights may change."""
        return self._session.released

    @property
    def is_done(self) -> bool:
        """Whether every replica has ended, and everybody whom this source leads knows."""
        return self._session.done

    @property
    def outcomes(self) -> dict[str, str | None]:
        """Per replica that has ended: None when it committed, else why it did not."""
        return self._session.outcomes

    @property
    def digest(self) -> str:
        """Of the version, once a replica has installed it: 32 hexadecimal digits; zeros without digests."""
        return self._session.digest

    @property
    def nbytes(self) -> int:
        """Bytes posted so far."""
        return self._session.nbytes

    def waiting_for(self) -> list[str]:
        """Whom this source is waiting for."""
        return self._session.waiting_for()

    def serve(self) -> bool:
        """One round of what `released` and `committed` do until they are done; says whether anything happened."""
        return self._loop.serve()

    def released(self, deadline: Deadline | None = None) -> None:
        """Serve until no replica reads this source's weights any more: afterwards they may change.

        Returns too when a replica has given the version up; `committed` says so. Raises `DeadlineError` that names
        who still reads (the offer is then withdrawn, and the weights may change).
        """
        limit = deadline or Deadline.after(self._deadlines.begin + self._deadlines.move)
        self._until(lambda: self._session.released, limit, f"release of version {self.version}")

    def committed(self, replicas: str | int = "all", deadline: Deadline | None = None) -> Report:
        """Serve until `replicas` ("all", "any", or a number) have committed.

        Raises `RefitAbortedError` with every replica's reason when that cannot happen any more, and `DeadlineError`.
        """
        session, expected = self._session, self._session.replicas
        wanted = {"all": expected, "any": 1}.get(replicas) if isinstance(replicas, str) else replicas
        if wanted is None or not 1 <= wanted <= expected:
            raise ConfigError(f'replicas is {replicas!r}, expected "all", "any" or a number from 1 to {expected}')

        def decided() -> bool:
            committed = sum(reason is None for reason in session.outcomes.values())
            return session.done or (wanted < expected and committed >= wanted)

        d = self._deadlines
        limit = deadline or Deadline.after(d.begin + d.move + d.vote + d.commit)
        self._until(decided, limit, f"commit of version {self.version}")
        outcomes = session.outcomes
        failed = {replica: reason for replica, reason in outcomes.items() if reason is not None}
        if expected - len(failed) < wanted:
            raise RefitAbortedError(
                self.version, [f"replica {name}: {reason}" for name, reason in sorted(failed.items())]
            )
        if session.done and self._loop.offered is session:
            self._loop.offered = None
        return Report(
            version=self.version, digest=session.digest, digested_by=self._account.digested_by, bytes=session.nbytes,
            seconds=self._account.seconds(session.clock.seconds), buckets=self._buckets, segments=self._segments,
            registrations=0, allocations=0, store_operations=self._account.store_operations(),
            outcomes=outcomes, events=tuple(session.events),
        )  # fmt: skip

    def withdraw(self, reason: str) -> None:
        """Give the version up in every replica that has not ended; the weights may change. Idempotent."""
        if not self._session.done:
            with contextlib.suppress(WeftError):
                self._loop.wire.pump()
                self._session.hear()  # what has been said by now counts
        if not self._session.done:
            self._session.give_up(reason)
        if self._loop.offered is self._session:
            self._loop.offered = None

    def _until(self, done: Callable[[], bool], limit: Deadline, what: str) -> None:
        try:
            self._loop.until(done, lambda: None, limit, what, self._session.waiting_for)
        except BaseException as error:
            self.withdraw(f"{type(error).__name__}: {error}")
            raise
