"""Leases stay alive while their holders are busy, and no longer than they said they would be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from weft.deadline import Deadline
from weft.errors import ConfigError, StoreError, WeftError
from weft.heartbeat import Heartbeat


@dataclass(eq=False)
class Lease:
    """One that takes note of what is done with it."""

    key: str = "key"
    seconds: float = 0.02
    renewals: int = 0
    faults: list[StoreError] = field(default_factory=list)
    released: bool = False

    def renew(self) -> None:
        if self.faults:
            raise self.faults[0]
        self.renewals += 1

    def release(self) -> None:
        self.released = True


def until(ready: Callable[[], object], what: str) -> None:
    Deadline.after(60).wait(lambda: bool(ready()), what, list)


@contextmanager
def beating(lease: Lease, heart: Heartbeat) -> Iterator[None]:
    heart.hold(lambda: lease)
    try:
        yield
    finally:
        heart.end()


def test_it_renews_until_its_end_and_gives_the_lease_up_then() -> None:
    lease, heart = Lease(), Heartbeat("a holder")
    with beating(lease, heart):
        until(lambda: lease.renewals > 3, "renewals")
        assert not lease.released
    assert lease.released
    before = lease.renewals
    heart.hold(lambda: pytest.fail("nothing is held after the end"))
    heart.end()
    assert lease.renewals == before
    assert not any(thread.name == "heartbeat of a holder" for thread in threading.enumerate())


def test_a_lease_that_is_lost_is_taken_again_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Lease(), Lease()
    taken = iter([first, second])
    heart = Heartbeat("a holder")
    heart.hold(lambda: next(taken))
    first.faults.append(StoreError("it is gone"))
    until(lambda: second.renewals, "the second lease")
    heart.end()
    assert "a holder gave no sign of life in time, and gives one again: it is gone" in caplog.text
    assert (first.released, second.released) == (False, True)


def test_a_store_that_is_away_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Lease(faults=[StoreError("no connection")]), Lease()
    answers: list[Lease | StoreError] = [first, StoreError("still none"), StoreError("still none"), second]

    def take() -> Lease:
        answer = answers.pop(0)
        if isinstance(answer, StoreError):
            raise answer
        return answer

    heart = Heartbeat("a holder")
    heart.hold(take)
    until(lambda: second.renewals, "the store")
    heart.end()
    assert caplog.text.count("a holder gives no sign of life until the store takes it: still none") == 2


def test_who_may_not_take_a_lost_lease_again_is_told_why() -> None:
    told: list[WeftError] = []

    def may() -> None:
        raise ConfigError("another has it")

    lease = Lease(faults=[StoreError("replaced")])
    heart = Heartbeat("a holder", may=may, failed=told.append)
    with beating(lease, heart):
        until(lambda: told, "the reason")
        until(lambda: not heart._thread.is_alive(), "the end of the heartbeat")
    assert [str(error) for error in told] == ["another has it"]


def test_whoever_stands_still_for_longer_than_it_said_is_not_held_alive(caplog: pytest.LogCaptureFixture) -> None:
    lease, heart = Lease(), Heartbeat("a holder")
    with beating(lease, heart):
        heart.touch(0.0)
        until(lambda: "a holder stands still for longer than it said it would" in caplog.text, "the end of patience")
        before = lease.renewals
        assert not heart._ended.wait(10 * lease.seconds)
        assert lease.renewals == before
        heart.touch(60.0)
        heart.touch(0.0)  # somebody else's work, which does not shorten what has been said
        until(lambda: lease.renewals > before + 1, "renewals")
    assert caplog.text.count("stands still") == 1
