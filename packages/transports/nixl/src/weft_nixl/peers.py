"""Who is connected and who is lost, and the notifications that keep this known: probes and farewells."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from weft.deadline import Deadline
from weft.endpoint import Inbox
from weft.errors import DeadlineError, PeerLostError, TransportError
from weft_nixl.lanes import Lane
from weft_nixl.library import FOREIGN, translated
from weft_nixl.options import NixlOptions
from weft_nixl.transfers import Held

_LOG = logging.getLogger(__name__)

_PROBE = b"?"
"""A notification that means nothing: sending it fails when the peer is gone."""
_FAREWELL = b"."
"""The last word of who closes, and the answer to it. Behind it stands how many notifications came before, for with
several UCX workers it may overtake them.
"""


class Address(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs. New fields go to the end, with defaults."""

    identity: str
    """Name of the agent, unique to this life of the endpoint."""
    metadata: bytes
    """NIXL's: how to connect, and every region registered so far."""
    direction: str = "push"
    """`NixlOptions.direction`."""


@dataclass(slots=True, eq=False)
class Peer:
    """One that is connected, or was until it was lost."""

    name: str
    address: Address
    lane: Lane
    lost: bool = False

    @property
    def identity(self) -> str:
        """Name of its agent."""
        return self.address.identity


class Peers:
    """All peers of one agent. Its caller holds the lock."""

    def __init__(
        self,
        agent: Any,
        lock: threading.RLock,
        inbox: Inbox,
        options: NixlOptions,
        gone: Callable[[Peer, PeerLostError], None],
    ) -> None:
        """`gone` is told once about each that is lost."""
        self._agent, self._lock, self._inbox, self._options, self._gone = agent, lock, inbox, options, gone
        self._known: dict[str, Peer] = {}
        self._leaving: list[tuple[Lane, list[Held]]] = []
        """Lanes of peers that were left while something was in flight, and what it needs."""
        self._said: Counter[str] = Counter()
        self._heard: Counter[str] = Counter()
        self._farewells: dict[str, int] = {}
        """By identity: notifications other than probes and farewells; those that its farewell promises."""
        self._next_probe = 0.0
        self._closing = False

    def everybody(self) -> list[Peer]:
        """All who are connected, or were until they were lost."""
        return list(self._known.values())

    def find(self, name: str) -> Peer | None:
        """The peer of this name."""
        return self._known.get(name)

    def named(self, identity: str) -> Peer | None:
        """The peer that is reached by this identity."""
        return next((each for each in self._known.values() if each.identity == identity and not each.lost), None)

    def reach(self, name: str) -> Peer:
        """The peer of this name. Raises `PeerLostError`."""
        known = self._known.get(name)
        if known is None or known.lost:
            raise PeerLostError(name, "not connected" if known is None else "it was lost earlier; connect again")
        return known

    def add(self, name: str, address: Address, deadline: Deadline) -> Peer:
        """Load its metadata and start connecting. The peer of this name must have been left."""
        if any(lane.identity == address.identity for lane, _ in self._leaving):
            deadline.wait(lambda: self._drained(address.identity), f"reading from {name}", lambda: [name])
        if deadline.expired():
            raise DeadlineError(f"connecting to {name}", deadline.seconds, [name])
        try:
            with translated("connecting", name):
                self._agent.add_remote_agent(address.metadata)
                self._agent.make_connection(address.identity)
        except TransportError as error:
            raise PeerLostError(name, f"its agent {address.identity} cannot be reached: {error}") from error
        may_abort = self._options.direction == "push"
        lane = Lane(
            self._lock, self._agent, name, address.identity, self._options.depth, may_abort, self.note_loss,
            self._inbox.stir,
        )  # fmt: skip
        self._known[name] = Peer(name, address, lane)
        self._inbox.admit(name, address.identity)
        return self._known[name]

    def leave(self, known: Peer, held: list[Held], keep_messages: bool) -> None:
        """Forget a peer, and what is `held` for it: at once or, where reads are in flight, when they are over."""
        del self._known[known.name]
        if not keep_messages:
            self._inbox.expel(known.name)
        known.lane.fail(PeerLostError(known.name, "disconnected"))
        self._said[known.identity] += known.lane.told
        self._leaving.append((known.lane, held))
        self._drained(known.identity)

    def lanes(self) -> list[Lane]:
        """Everybody's, with those of peers that were left while something was in flight."""
        return [*(each.lane for each in self._known.values()), *(lane for lane, _ in self._leaving)]

    def advance(self) -> None:
        """Move what can be moved."""
        for known in list(self._known.values()):
            known.lane.advance()
        for lane, _ in list(self._leaving):
            self._drained(lane.identity)

    def _drained(self, identity: str) -> bool:
        """Whether nothing of an agent that was left is in flight; then it is gone."""
        for entry in [entry for entry in self._leaving if entry[0].identity == identity]:
            lane, held = entry
            lane.advance()
            if lane.flight:
                return False
            self._leaving.remove(entry)
            self._remove(lane, held)
        return True

    def _remove(self, lane: Lane, held: list[Held]) -> None:
        for each in held:
            each.drop()
        try:
            self._agent.remove_remote_agent(lane.identity)
        except FOREIGN as error:
            _LOG.debug("removing %s: %s", lane.identity, error)

    def notify(self, name: str, message: bytes) -> None:
        """Say something to a peer. Raises `PeerLostError` and notes it."""
        known = self.reach(name)
        self._send(known, message)
        self._said[known.identity] += 1

    def _send(self, known: Peer, message: bytes) -> None:
        try:
            with translated("sending a message", known.name):
                self._agent.send_notif(known.identity, message)
        except PeerLostError as error:
            self.note_loss(error)
            raise

    def hear(self, identity: str, message: bytes) -> bool:
        """Take in a probe or a farewell; whether it is none, but something said to whoever uses this."""
        if message == _PROBE:
            return False
        if message.startswith(_FAREWELL):
            self._farewells[identity] = int(message[1:] or b"0")
            return False
        self._heard[identity] += 1
        return True

    def part(self) -> None:
        """See off those who have said farewell, first or in answer, and everything before it."""
        for identity in [each for each, count in self._farewells.items() if self._heard[each] >= count]:
            del self._farewells[identity]
            known = self.named(identity)
            if known is not None:
                if not self._closing:
                    self._say_farewell(known)
                self.note_loss(PeerLostError(known.name, "it has closed"))

    def say_farewell(self) -> None:
        """To everybody; who answers is lost."""
        self._closing = True
        for known in [each for each in self._known.values() if not each.lost]:
            self._say_farewell(known)

    @property
    def present(self) -> bool:
        """Whether anybody is connected and not lost."""
        return any(not each.lost for each in self._known.values())

    def _say_farewell(self, known: Peer) -> None:
        count = self._said[known.identity] + known.lane.told
        self._try_to_send(known, _FAREWELL + str(count).encode())

    def probe(self) -> None:
        """Once in a while, so that a receiver learns of a dead sender."""
        now = time.monotonic()
        if now >= self._next_probe:
            self._next_probe = now + self._options.probe_seconds
            for known in [each for each in self._known.values() if not each.lost]:
                self._try_to_send(known, _PROBE)

    def _try_to_send(self, known: Peer, message: bytes) -> None:
        try:
            self._send(known, message)
        except PeerLostError as error:
            _LOG.debug("%s: %s", known.name, error)

    def note_loss(self, error: TransportError) -> None:
        """Whoever is lost says nothing more, and nothing is posted to it."""
        known = self._known.get(error.peer) if isinstance(error, PeerLostError) else None
        if known is not None and isinstance(error, PeerLostError) and not known.lost:
            known.lost = True
            known.lane.fail(error)
            self._inbox.lose(error)
            self._gone(known, error)

    def abort(self) -> None:
        """End everything that moves: the agent is about to go, and without it nothing is written here any more."""
        for lane in self.lanes():
            lane.may_abort = True
            lane.fail(PeerLostError(lane.peer, "disconnected"))
