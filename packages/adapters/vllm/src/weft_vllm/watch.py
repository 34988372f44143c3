"""A worker's background watcher: it fetches versions beside running forward passes, and installs none of them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from weft.deadline import Deadline
from weft.errors import ConfigError, RefitAbortedError
from weft.installation import Installation
from weft.publication import Subscriber
from weft.refit import Refit

_POLL_SECONDS = 5e-3
"""Between looks at what has arrived, while there is nothing else to do."""
_LOOK_SECONDS = 1.0
"""Between looks whether to go on, while nobody has published anything; and before a version is fetched again."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What a watcher is at; replaced as a whole, so that any thread may look at it."""

    stage: str = "waiting"
    """`waiting` for an offer, `fetching` one, `ready` (fetched, and voted for by the whole replica), or `failed`."""
    version: int | None = None
    error: str | None = None
    """Why the version was given up, where it failed."""


class Watcher:
    """A thread that waits for what is offered or published and fetches it into shadow memory (trap 51: it applies
    nothing).

    While the thread runs, the member is its own; `take` ends it and hands a fetched version over to the caller, who
    starts it again when that version has been installed or given up. All waits end by the deadlines of the member.
    """

    def __init__(self, member: Refit | Subscriber, device: torch.device) -> None:
        self._member, self._device = member, device
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._fetched: Installation | None = None
        self._told: Watched | None = None
        self.state = Watched()

    def start(self) -> None:
        """Watch from now on."""
        self._stopping.clear()
        self._fetched = None
        self.state = Watched()
        self._thread = threading.Thread(target=self._watch, name="weft-watcher", daemon=True)
        self._thread.start()

    def stop(self, deadline: Deadline) -> Installation | None:
        """End the thread: the member belongs to the caller, and so does a version that is ready. What is being fetched
        is given up. Raises `DeadlineError`: the thread then still has the member, and `stop` may be called again.
        """
        thread = self._thread
        if thread is None:
            return None
        self._stopping.set()
        deadline.wait(lambda: not thread.is_alive(), "the end of the watcher", lambda: [f"{self.state}"])
        self._thread = None
        fetched, self._fetched = self._fetched, None
        return fetched

    def take(self, deadline: Deadline) -> Installation:
        """Wait until a version is ready, and take it over. Raises `DeadlineError`, and `RefitAbortedError` with the
        reason why the last one failed: the watcher then goes on, and nothing that is served has changed.
        """
        deadline.wait(
            lambda: self.state.stage == "ready" or self._failed is not None,
            "a version in shadow memory",
            lambda: [f"{self._member.name} is {self.state.stage}"],
        )
        if self.state.stage == "ready" and (fetched := self.stop(deadline)) is not None:
            return fetched
        failed = self.state  # perhaps while it was being taken
        if self._stopping.is_set():
            self.stop(deadline)  # where an earlier call did not see the thread's end
            self.start()
        self.acknowledge(failed)
        raise RefitAbortedError(-1 if failed.version is None else failed.version, [failed.error or "it was given up"])

    def acknowledge(self, failed: Watched | None = None) -> None:
        """The failure that `state` shows is known to the caller: what comes next is another version."""
        self._told = failed or self.state

    @property
    def _failed(self) -> Watched | None:
        """The failure that nobody has been told of, if any."""
        seen = self.state
        return seen if seen.error is not None and seen is not self._told else None

    def report(self) -> dict[str, Any]:
        """The state, as plain values; a failure until it is acknowledged, or another version is being fetched."""
        seen = self.state
        known = Watched() if seen.error is not None and seen is self._told else seen
        return {"stage": known.stage, "version": known.version, "error": known.error}

    def _watch(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device)  # every thread has its own
        while not self._stopping.is_set():
            try:
                installation = self._next()
                if installation is None:
                    continue
                self.state = Watched("ready", installation.version)
                while not self._stopping.wait(_POLL_SECONDS):
                    installation.tend()
                self._fetched = installation
            except Exception as error:  # noqa: BLE001 - `take` raises it, and the engine serves on
                version = None if self.state.stage == "failed" else self.state.version
                self.state = Watched("failed", version, f"{type(error).__name__}: {error}")

    def _next(self) -> Installation | None:
        """A version that has been fetched; None when there was none so far."""
        member = self._member
        return self._published(member) if isinstance(member, Subscriber) else self._offered(member)

    def _offered(self, refit: Refit) -> Installation | None:
        if self._stopping.wait(_POLL_SECONDS) or (version := refit.offered()) is None:
            return None
        self.state = Watched("fetching", version)
        installation = refit.begin()
        installation.fetch(self._go_on)
        return installation

    def _published(self, subscriber: Subscriber) -> Installation | None:
        if self.state.stage == "failed":
            self._stopping.wait(_LOOK_SECONDS)  # it is fetched again, and whoever asks is to be told before
        if self._stopping.is_set() or not subscriber.offered(Deadline.after(_LOOK_SECONDS)):
            return None
        self.state = Watched("fetching")
        return subscriber.fetch(self._fetching)

    def _fetching(self, version: int) -> None:
        self.state = Watched("fetching", None if version < 0 else version)
        self._go_on()

    def _go_on(self) -> None:
        time.sleep(0)  # forward passes want the interpreter, too
        if self._stopping.is_set():
            raise ConfigError("the watcher was stopped while it fetched: the engine leaves the job")
