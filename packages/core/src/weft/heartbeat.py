"""Signs of life: a lease is renewed by a thread of its own, however long its holder is busy elsewhere."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from weft.contracts import StoreLease
from weft.errors import StoreError, WeftError

_LOG = logging.getLogger(__name__)
_BEATS = 4
"""In the time after which a lease is lost."""


class Heartbeat:
    """Keeps one lease alive until `end`. A process that is frozen freezes its heartbeat, too, and loses the lease.

    A process whose work stands still is not held alive for ever: once it has said by `touch` for how long, and that
    time has passed, nothing is renewed until it says so again. A lease that is lost is taken again, which is logged.
    Safe to use from several threads.
    """

    def __init__(
        self, name: str, *, may: Callable[[], None] = lambda: None,
        failed: Callable[[WeftError], None] = lambda error: None,
    ) -> None:  # fmt: skip
        """`may` is called before a lost lease is taken again. What it raises is given to `failed` and ends the
        heartbeat, unless it is a `StoreError`: then it is tried again. Both are called in the heartbeat's thread.
        """
        self._name, self._may, self._failed = name, may, failed
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._take: Callable[[], StoreLease] | None = None
        self._lease: StoreLease | None = None
        self._until = math.inf
        self._thread = threading.Thread(target=self._run, name=f"heartbeat of {name}", daemon=True)

    def hold(self, take: Callable[[], StoreLease]) -> None:
        """Take a lease, in place of the former one, and keep it alive. Raises what `take` does. Nothing after `end`."""
        with self._lock:
            if self._ended.is_set():
                return
            self._take, self._lease = take, take()
            if self._thread.ident is None:
                self._thread.start()

    def touch(self, seconds: float) -> None:
        """Work goes on: it is to be heard of again within so many seconds. Never shortens what was said before."""
        until = time.monotonic() + seconds
        self._until = until if self._until == math.inf else max(self._until, until)

    def end(self) -> None:
        """Give the lease up. Idempotent; not from `may` or `failed`."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock, suppress(StoreError):  # it runs out by itself
            if self._lease is not None:
                self._lease.release()

    def _run(self) -> None:
        assert self._lease is not None, "it is held"
        seconds, silent = self._lease.seconds, False
        while not self._ended.wait(seconds / _BEATS):
            stuck = time.monotonic() > self._until
            if stuck and not silent:
                _LOG.error("%s stands still for longer than it said it would: its lease runs out", self._name)
            silent = stuck
            try:
                if not stuck:
                    self._beat()
            except StoreError as error:
                _LOG.warning("%s gives no sign of life until the store takes it: %s", self._name, error)
            except WeftError as error:
                self._failed(error)
                return

    def _beat(self) -> None:
        with self._lock:
            assert self._lease is not None, "it is held"
            assert self._take is not None, "it is held"
            try:
                self._lease.renew()
            except StoreError as error:
                self._may()
                _LOG.warning("%s gave no sign of life in time, and gives one again: %s", self._name, error)
                self._lease = self._take()
