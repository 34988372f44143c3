"""Who may send to whom next, for transports whose two ends must act together: receivers grant turns.

A sender *asks* a receiver for a turn, which holds one of its own places from then on. The receiver *grants* asks in the
order in which they came while it has places. The sender answers that it *goes* (then both ends move the bytes at once)
or has *withdrawn*. So a turn under way waits for nobody but its two ends, and no circle of members can wait for each
other; with one place each, nobody ever sends to, or receives from, two at once.

Pure: nothing here sends or waits. `weft.granted` carries what these classes say between members.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


@dataclass(eq=False)
class Turn(Generic[Item]):
    """Some items that move from one member to another without a pause."""

    peer: str
    number: int
    """Unique at the sender."""
    items: list[Item]
    under_way: bool = False


@dataclass(eq=False)
class Outgoing(Generic[Item]):
    """A sender's side."""

    places: int
    """Most turns asked for or under way, each with another peer."""
    most_items: int
    """Most items of a turn."""
    kind: Callable[[Item], object]
    """Items of different kinds are never in one turn."""
    order: Callable[[str], Any] = lambda peer: 0
    """Which peers are asked first, of those that something waits for; equal ones in the order in which it came."""
    turns: dict[str, Turn[Item]] = field(default_factory=dict)
    """At most one per peer."""
    _queues: dict[str, deque[Item]] = field(default_factory=dict)
    _count: int = 0

    def put(self, peer: str, item: Item) -> None:
        """Something to be sent, after everything put for this peer before."""
        self._queues.setdefault(peer, deque()).append(item)

    def asks(self) -> list[Turn[Item]]:
        """New turns to ask for."""
        new: list[Turn[Item]] = []
        for peer in sorted((peer for peer in self._queues if peer not in self.turns), key=self.order):
            if len(self.turns) >= self.places:
                break
            queue = self._queues[peer]
            self._count += 1
            turn = Turn(peer, self._count, [queue.popleft()])
            while queue and len(turn.items) < self.most_items and self.kind(queue[0]) == self.kind(turn.items[0]):
                turn.items.append(queue.popleft())
            if not queue:
                del self._queues[peer]
            self.turns[peer] = turn
            new.append(turn)
        return new

    def granted(self, peer: str, number: int) -> Turn[Item] | None:
        """The turn that now goes; None when it was withdrawn meanwhile, which the receiver learns anyway."""
        return _begun(self.turns, peer, number)

    def cancel(self, peer: str, item: Item) -> Turn[Item] | None:
        """Take an item back unless its turn is under way. A turn to be withdrawn; what else it held waits again."""
        turn = self.turns.get(peer)
        if turn is not None and item in turn.items:
            if turn.under_way:
                return None
            rest = [other for other in turn.items if other is not item]
            del self.turns[peer]
            if rest:
                self._queues[peer] = deque([*rest, *self._queues.get(peer, ())])
            return turn
        queue = self._queues.get(peer, deque())
        if item in queue:
            queue.remove(item)
            if not queue:
                del self._queues[peer]
        return None

    def ended(self, peer: str) -> None:
        """Its turn is over."""
        self.turns.pop(peer, None)

    def drop(self, peer: str) -> list[Item]:
        """Forget a peer; everything that was for it."""
        turn = self.turns.pop(peer, None)
        return [*(turn.items if turn else ()), *self._queues.pop(peer, ())]

    def waiting(self) -> Iterable[str]:
        """Peers that something is for and not finished."""
        return {*self.turns, *self._queues}


@dataclass(eq=False)
class Incoming(Generic[Item]):
    """A receiver's side."""

    places: int
    """Most turns granted or under way."""
    turns: dict[str, Turn[Item]] = field(default_factory=dict)
    """Granted ones, by sender."""
    _asked: dict[str, Turn[Item]] = field(default_factory=dict)

    def asked(self, peer: str, number: int, items: list[Item]) -> None:
        """A peer wants a turn."""
        self._asked[peer] = Turn(peer, number, items)

    def grants(self, ready: Callable[[Turn[Item]], bool]) -> list[Turn[Item]]:
        """Turns to grant now: the oldest asks among those that are `ready`."""
        new: list[Turn[Item]] = []
        for peer, turn in list(self._asked.items()):
            if len(self.turns) >= self.places:
                break
            if ready(turn):
                del self._asked[peer]
                self.turns[peer] = turn
                new.append(turn)
        return new

    def refuse(self, unwanted: Callable[[Turn[Item]], bool]) -> list[Turn[Item]]:
        """Forget asks that are not wanted."""
        found = [turn for turn in self._asked.values() if unwanted(turn)]
        for turn in found:
            del self._asked[turn.peer]
        return found

    def goes(self, peer: str, number: int) -> Turn[Item] | None:
        """The granted turn that the sender now begins; None for one that was never granted."""
        return _begun(self.turns, peer, number)

    def withdrawn(self, peer: str, number: int) -> None:
        """The sender does not want it any more."""
        for turns in (self._asked, self.turns):
            if peer in turns and turns[peer].number == number and not turns[peer].under_way:
                del turns[peer]

    def ended(self, peer: str) -> None:
        """Its turn is over."""
        self.turns.pop(peer, None)

    def drop(self, peer: str) -> None:
        """Forget a peer."""
        self._asked.pop(peer, None)
        self.turns.pop(peer, None)


def _begun(turns: Mapping[str, Turn[Item]], peer: str, number: int) -> Turn[Item] | None:
    """The peer's turn of this number, under way from now on; None when there is none that may begin."""
    turn = turns.get(peer)
    if turn is None or turn.number != number or turn.under_way:
        return None
    turn.under_way = True
    return turn
