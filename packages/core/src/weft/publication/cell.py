"""One replica that reads from a holder: a thread that serves it whenever it asks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from weft.contracts import Waiting
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, WeftError
from weft.loop import step_until
from weft.offer import Offer
from weft.publication.copies import Copy
from weft.refit import Refit
from weft.wire import Notice

_LOG = logging.getLogger(__name__)
_REST_SECONDS = 0.02
"""Between looks at the connection of a replica that asks for nothing."""


class Closing(WeftError):
    """The holder closes while a replica reads."""


@dataclass(frozen=True, slots=True)
class _Want:
    """What the replica asks for."""

    asker: str
    have: int
    """Anything newer will do,"""
    exact: int | None
    """unless it is this one alone."""
    tensors: str
    """What the digest of a version is of, there (`weft.publication.holders.tensors_of`)."""


class Cell:
    """The cell of one replica at one member of a holder.

    The holder's first member hears what the replica wants, and tells the others which version to serve: so all serve
    the same, and only when the replica waits for it.
    """

    def __init__(
        self, name: str, refit: Refit, copy: Copy, deadlines: Deadlines, *, leads: bool,
        ended: Callable[[], None], served: Callable[[int, str, str], None], former: Cell | None = None,
    ) -> None:  # fmt: skip
        """The replica's `former` cell, which has been told to stop, is left first. `served` is told each version that
        the replica has installed, with its digest and of which tensors that is, at the first member; `ended` that a
        read, or all of it, is over. Both are called in the cell's own thread.
        """
        self.name = name
        self._refit, self._copy, self._deadlines, self._leads = refit, copy, deadlines, leads
        self._ended, self._served = ended, served
        self._former = former
        self._want: _Want | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"cell of {name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the replica may still be served."""
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def running(self) -> bool:
        """Whether its thread has not ended yet."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Begin to end; `join` waits for it."""
        self._stopping.set()

    def join(self) -> None:
        """Until the thread has left its cell: a replica that is just joining is waited for."""
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._former is not None:
                self._former.join()
                self._former = None
            self._refit.open()
            if (self._refit.roles.source_leader == self._refit.name) != self._leads:
                raise ConfigError(
                    f"the member of rank 0 must be the first by name, but that is {self._refit.roles.source_leader}"
                )
            while not self._stopping.is_set():
                self._round()
        except Closing:
            pass
        except WeftError as error:
            _LOG.warning("%s goes on without replica %s: %s", self._refit.name, self.name, error)
        finally:
            self._stopping.set()
            self._refit.close()
            self._ended()

    def _round(self) -> None:
        wire = self._refit.loop.wire
        wire.pump()
        roles = self._refit.roles
        wire.check(lambda: [*roles.sources, *(name for names in roles.replicas.values() for name in names)])
        version = self._wanted() if self._leads else self._told()
        if version is None or not self._serve(version):
            if isinstance(wire.transport, Waiting):
                wire.transport.wait(_REST_SECONDS)
            else:
                self._stopping.wait(_REST_SECONDS)

    def _wanted(self) -> int | None:
        """The version to serve now, at the first member."""
        wire, version = self._refit.loop.wire, self._copy.version
        if (asked := wire.newest("want")) is not None:
            asker, notice = wire.take(asked, "want")[-1]
            have, *exact = notice.numbers
            self._want = _Want(asker, have, exact[0] if exact else None, notice.text)
        want = self._want
        if want is None or version <= want.have:
            return None
        if want.exact not in (None, version):
            gone = f"{self._refit.name} has given it up for version {version} meanwhile"
            wire.tell(want.asker, want.have + 1, Notice("withdraw", text=gone))
            self._want = None
            return None
        return version

    def _told(self) -> int | None:
        """The version to serve now, at the others."""
        wire = self._refit.loop.wire
        version = wire.newest("serve")
        if version is not None:
            wire.take(version, "serve")
            limit = self._deadlines.begin + self._deadlines.move  # of whoever still reads the one before
            self._copy.await_version(version, Deadline.after(limit))
        return version

    def _serve(self, version: int) -> bool:
        """Whether it could be: not while a version is about to be taken over."""
        wire, d = self._refit.loop.wire, self._deadlines
        with self._copy.reading(version) as there:
            if not there:
                return False
            want, self._want = self._want, None
            if self._leads:
                for source in self._refit.roles.sources:
                    if source != wire.me.name:
                        wire.tell(source, version, Notice("serve"))
            offer = self._refit.offer(version)
            self._until(offer, lambda: offer.is_released, d.begin + d.move, "release")
        self._ended()
        self._until(offer, lambda: offer.is_done, d.move + d.vote + d.commit, "commit")
        for replica, reason in offer.outcomes.items():
            if reason is not None:
                _LOG.warning("replica %s does not have version %d: %s", replica, version, reason)
        if want is not None and offer.digest:
            self._served(version, offer.digest, want.tensors)
        return True

    def _until(self, offer: Offer, done: Callable[[], bool], seconds: float, what: str) -> None:
        def step() -> bool:
            if self._stopping.is_set():
                raise Closing("the holder closes")
            return offer.serve()

        transport = self._refit.loop.wire.transport
        wait = transport.wait if isinstance(transport, Waiting) else None
        what = f"{what} of version {offer.version}"
        try:
            step_until(done, step, Deadline.after(seconds), what, offer.waiting_for, wait)
        except WeftError as error:
            offer.withdraw(f"{type(error).__name__}: {error}")
            raise
