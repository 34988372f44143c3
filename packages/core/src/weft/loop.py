"""The loop in which a member waits: it takes in messages and steps its sessions, so that it serves others while it
waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from weft.contracts import Waiting
from weft.deadline import Deadline
from weft.errors import DeadlineError
from weft.session import SourceSession
from weft.wire import Wire

_FIRST_SLEEP_SECONDS = 20e-6
_LONGEST_SLEEP_SECONDS = 1e-3
"""Between polls while nothing arrives."""
_LONGEST_WAIT_SECONDS = 10e-3
"""Between polls of a transport that says itself when something happens."""


def step_until(
    done: Callable[[], bool],
    step: Callable[[], bool],
    deadline: Deadline,
    what: str,
    late: Callable[[], Sequence[str]],
    wait: Callable[[float], None] | None = None,
) -> None:
    """Step until `done`, resting a little longer each time that a step says that nothing has happened.

    `wait`, if there is one, rests until something may have. Raises what `step` raises, and `DeadlineError` that names
    `late()`.
    """
    sleep_seconds = _FIRST_SLEEP_SECONDS
    while True:
        busy = step()
        if done():
            return
        if deadline.expired():
            raise DeadlineError(what, deadline.seconds, late())
        if busy:
            sleep_seconds = _FIRST_SLEEP_SECONDS
        elif wait is not None:
            wait(_LONGEST_WAIT_SECONDS)
        else:
            time.sleep(sleep_seconds)
            sleep_seconds = min(2 * sleep_seconds, _LONGEST_SLEEP_SECONDS)


class Loop:
    """One member's waits."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.offered: SourceSession | None = None
        """The offer that is served while this member waits for anything at all."""

    def serve(self) -> bool:
        """One round of what is done for others: take in messages, and step the offer; whether anything happened."""
        busy = self.wire.pump()
        if self.offered is not None:
            before = self.offered.nbytes
            self.offered.step()
            busy |= self.offered.nbytes != before  # what has left makes room for the next
        return busy

    def until(
        self,
        done: Callable[[], bool],
        step: Callable[[], None],
        deadline: Deadline,
        what: str,
        late: Callable[[], Sequence[str]],
    ) -> None:
        """Serve and step until `done`. Raises what `step` raises, and `DeadlineError` that names `late()`."""
        transport = self.wire.transport

        def round() -> bool:
            busy = self.serve()
            step()
            return busy or self.wire.told_itself

        wait = transport.wait if isinstance(transport, Waiting) else None
        step_until(done, round, deadline, what, late, wait)


class Account:
    """What a refit costs in this member, counted from its beginning."""

    def __init__(self, operations: Callable[[], int], digested_by: str) -> None:
        self.digested_by = digested_by
        """As in `Report`."""
        self._operations = operations
        self._operations_before = operations()
        self._begin_seconds = time.perf_counter()

    def store_operations(self) -> int:
        """Operations on the store since."""
        return self._operations() - self._operations_before

    def seconds(self, phases: dict[str, float]) -> dict[str, float]:
        """All phases: `wire` is what the others leave of `total`."""
        total = time.perf_counter() - self._begin_seconds
        known = {name: phases.get(name, 0.0) for name in ("gather", "digest", "land", "install", "commit")}
        return {**known, "wire": max(0.0, total - sum(known.values())), "total": total}
