"""Transfers between this end and one peer: a bounded number of them in flight, the rest in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from weft.contracts import Event
from weft.errors import TransportError
from weft_nixl.library import FOREIGN, translated
from weft_nixl.transfers import Chunk, Moved


@dataclass(slots=True, eq=False)
class Transfer:
    """One bucket on its way."""

    moved: Moved
    message: bytes = b""
    """Goes with the last byte; empty tells nobody."""
    after: Event | None = None
    ended: Callable[[], None] | None = None
    """Called when nothing of it moves any more, for whatever reason."""
    started: int = 0
    """Chunks that were posted."""
    finished: int = 0
    """Chunks that are complete."""
    given_up: bool = False
    done: bool = False
    error: TransportError | None = None

    def may_start(self) -> bool:
        """Whether there is something left of it to be posted, now."""
        chunks = len(self.moved.chunks)
        return not self.done and self.started < max(chunks, 1) and (self.after is None or self.after.query())


@dataclass(slots=True, eq=False)
class Lane:
    """Everything that moves between here and one peer: at most `depth` chunks in flight, the rest in order of posting.

    A chunk that is given up while it is in flight is aborted where that harms nobody here (`may_abort`: writes into the
    peer's memory). Reads go on to their end, and nothing else begins before: NIXL can neither stop one nor say that it
    has, and it would write into memory that is in use for something else.
    """

    lock: threading.RLock
    """The transport's: held by whoever calls anything here."""
    agent: Any
    peer: str
    identity: str
    depth: int
    may_abort: bool
    lost: Callable[[TransportError], None]
    """Told about every failure."""
    ended: Callable[[], None]
    """Called when a transfer is over."""
    told: int = 0
    """Messages that have left with transfers."""
    transfers: list[Transfer] = field(default_factory=list)
    flight: list[tuple[Transfer, Chunk]] = field(default_factory=list)

    def put(self, transfer: Transfer) -> None:
        """Queue it and start what may start."""
        self.transfers.append(transfer)
        self.advance()

    def advance(self) -> None:
        """See what has completed, then start what may start. Never waits, never raises: errors stay with their
        transfer.
        """
        for entry in list(self.flight):
            if entry in self.flight:
                self._guard(self._check, *entry)
        for transfer in list(self.transfers):
            if transfer.given_up or len(self.flight) >= self.depth:
                break
            if transfer.may_start():
                self._guard(self._start, transfer)

    def give_up(self, transfer: Transfer, error: TransportError | None) -> None:
        """End a transfer, with an error or without; now, or when the last of it that cannot be aborted is over."""
        if transfer.done:
            return
        transfer.given_up = True
        transfer.error = transfer.error or (error and error.again())
        if self.may_abort:
            for entry in [entry for entry in self.flight if entry[0] is transfer]:
                self.flight.remove(entry)
                entry[1].drop()
        self._settle(transfer)

    def fail(self, error: TransportError) -> None:
        """End everything with an error."""
        for transfer in list(self.transfers):
            self.give_up(transfer, error)

    def _guard(self, step: Callable[..., None], transfer: Transfer, *arguments: Any) -> None:
        try:
            with translated(transfer.moved.what, self.peer):
                step(transfer, *arguments)
        except TransportError as error:
            self.give_up(transfer, error)
            self.lost(error)

    def _check(self, transfer: Transfer, chunk: Chunk) -> None:
        self._take(transfer, chunk, lambda: self.agent.check_xfer_state(chunk.handle))

    def _start(self, transfer: Transfer) -> None:
        """Post its next chunks. The last one carries the message, so it goes when all others are complete."""
        chunks = transfer.moved.chunks
        if not chunks:
            if transfer.message:
                self.agent.send_notif(self.identity, transfer.message)
            self._settle(transfer)
        while transfer.started < len(chunks) and len(self.flight) < self.depth:
            message = transfer.message if transfer.started == len(chunks) - 1 else b""
            if message and transfer.finished < transfer.started:
                return
            chunk = chunks[transfer.started]
            chunk.make(self.agent, self.peer)
            transfer.started += 1
            self.flight.append((transfer, chunk))
            self._take(transfer, chunk, lambda: self.agent.transfer(chunk.handle, message))  # noqa: B023  # called here

    def _take(self, transfer: Transfer, chunk: Chunk, state: Callable[[], str]) -> None:
        """Take in the state of a chunk in flight; one that has failed is over."""
        try:
            complete = state() == "DONE"
        except FOREIGN:
            self.flight.remove((transfer, chunk))
            chunk.drop()
            raise
        if complete:
            self.flight.remove((transfer, chunk))
            transfer.finished += 1
            self._settle(transfer)

    def _settle(self, transfer: Transfer) -> None:
        """End it if nothing of it is in flight or to come."""
        complete = transfer.finished == len(transfer.moved.chunks)
        aborted = transfer.given_up and not any(moving is transfer for moving, _ in self.flight)
        if transfer.done or not (complete or aborted):
            return
        transfer.done = True
        self.transfers.remove(transfer)
        self.told += bool(transfer.message) and not transfer.given_up
        if transfer.ended is not None:
            transfer.ended()
        self.ended()
