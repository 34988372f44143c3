"""A version as the sources of a fleet see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, RefitAbortedError, WeftError
from weft.loop import step_until
from weft.offer import Offer


class FleetReport(msgspec.Struct, frozen=True, kw_only=True):
    """One source's account of one version."""

    version: int
    digest: str
    """Of the version: 32 hexadecimal digits; empty when no replica has installed it."""
    outcomes: dict[str, str | None]
    """Per replica that took part: None when it committed, else why it did not."""
    bytes: int
    """Sent by this source."""
    store_operations: int
    """Of this source."""


class FleetOffer:
    """A version that this source offers to every replica of the fleet. Made by `Fleet.offer`."""

    def __init__(
        self, version: int, offers: Mapping[str, Offer], deadlines: Deadlines, operations: Callable[[], int]
    ) -> None:
        self.version = version
        self._offers, self._deadlines = offers, deadlines
        self._operations = operations

    @property
    def outcomes(self) -> dict[str, str | None]:
        """Per replica that has ended: None when it committed, else why it did not."""
        return {name: reason for offer in self._offers.values() for name, reason in offer.outcomes.items()}

    def released(self, deadline: Deadline | None = None) -> None:
        """Serve until no replica reads this source's weights any more: afterwards they may change.

        Raises `DeadlineError` that names who still reads; the version is then withdrawn, and the weights may change.
        """
        limit = deadline or Deadline.after(self._deadlines.begin + self._deadlines.move)
        self._until(lambda: all(offer.is_released for offer in self._offers.values()), limit, "release")

    def committed(self, replicas: str | int = "all", deadline: Deadline | None = None) -> FleetReport:
        """Serve until `replicas` ("all" that take part, "any", or a number) have committed.

        Those that have not ended then are given up by the next offer. Raises `RefitAbortedError` with every replica's
        reason when that cannot happen any more, and `DeadlineError`.
        """
        there = len(self._offers)
        wanted = {"all": there, "any": min(1, there)}.get(replicas) if isinstance(replicas, str) else replicas
        if wanted is None or wanted < 0:
            raise ConfigError(f'replicas is {replicas!r}, expected "all", "any" or a number')

        def decided() -> bool:
            ended = [reason is None for reason in self.outcomes.values()]
            done = all(offer.is_done for offer in self._offers.values())
            return done or (wanted < there and sum(ended) >= wanted)

        d = self._deadlines
        limit = deadline or Deadline.after(d.begin + d.move + d.vote + d.commit)
        self._until(decided, limit, "commit")
        outcomes = self.outcomes
        if sum(reason is None for reason in outcomes.values()) < wanted:
            reasons = [f"replica {name}: {reason}" for name, reason in sorted(outcomes.items()) if reason is not None]
            raise RefitAbortedError(self.version, reasons or [f"{there} replicas take part, and {wanted} are wanted"])
        return FleetReport(
            version=self.version, digest=next((o.digest for o in self._offers.values() if o.digest), ""),
            outcomes=outcomes, bytes=sum(offer.nbytes for offer in self._offers.values()),
            store_operations=self._operations(),
        )  # fmt: skip

    def withdraw(self, reason: str) -> None:
        """Give the version up in every replica that has not ended; the weights may change. Idempotent."""
        for offer in self._offers.values():
            offer.withdraw(reason)

    def _until(self, done: Callable[[], bool], limit: Deadline, what: str) -> None:
        def serve() -> bool:
            busy = [self._serve(offer) for offer in self._offers.values()]  # all of them, in every round
            return any(busy)

        def late() -> list[str]:
            return [name for offer in self._offers.values() for name in offer.waiting_for()]

        try:
            step_until(done, serve, limit, f"{what} of version {self.version}", late)
        except DeadlineError:
            self.withdraw(f"{what} of version {self.version}: not within {limit.seconds:.1f} s")
            raise

    def _serve(self, offer: Offer) -> bool:
        """One round in one cell, whose failure ends the version there alone."""
        try:
            return offer.serve()
        except WeftError as error:
            offer.withdraw(f"{type(error).__name__}: {error}")
            return True
