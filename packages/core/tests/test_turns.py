"""Turns: whatever order messages come in, everything arrives in order and no end has more turns than places."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as some

from weft.turns import Incoming, Outgoing, Turn

Item = tuple[str, str, int]


@dataclass
class World:
    """Members that only have turns, and a network that delivers in order between two of them and not otherwise."""

    places: int
    out: dict[str, Outgoing[Item]] = field(default_factory=dict)
    into: dict[str, Incoming[Item]] = field(default_factory=dict)
    wires: dict[tuple[str, str], deque[tuple[str, int, list[Item]]]] = field(default_factory=dict)
    arrived: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    moving: list[Turn[Item]] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.out[name] = Outgoing(self.places, 2, lambda item: 0)
        self.into[name] = Incoming(self.places)

    def say(self, sender: str, receiver: str, word: str, number: int, items: list[Item]) -> None:
        self.wires.setdefault((sender, receiver), deque()).append((word, number, items))

    def settle(self, name: str) -> None:
        """What a member does after anything has happened."""
        for turn in self.out[name].asks():
            self.say(name, turn.peer, "ask", turn.number, list(turn.items))
        for granted in self.into[name].grants(lambda turn: True):
            self.say(name, granted.peer, "grant", granted.number, [])
        assert len(self.out[name].turns) <= self.places
        assert len(self.into[name].turns) <= self.places

    def deliver(self, sender: str, receiver: str) -> None:
        word, number, items = self.wires[sender, receiver].popleft()
        match word:
            case "ask":
                self.into[receiver].asked(sender, number, items)
            case "grant" if self.out[receiver].granted(sender, number) is not None:
                self.say(receiver, sender, "go", number, [])
            case "go":
                turn = self.into[receiver].goes(sender, number)
                assert turn is not None
                for _, _, item in turn.items:
                    self.arrived.setdefault((sender, receiver), []).append(item)
                self.into[receiver].ended(sender)
                self.say(receiver, sender, "end", number, [])
            case "withdrawn":
                self.into[receiver].withdrawn(sender, number)
            case "end":
                self.out[receiver].ended(sender)
        self.settle(receiver)

    def run(self, choose: some.DataObject) -> None:
        for name in self.out:
            self.settle(name)
        while busy := sorted(wire for wire, words in self.wires.items() if words):
            self.deliver(*choose.draw(some.sampled_from(busy)))


MEMBERS = "abcd"
WAYS = some.sampled_from([(s, r) for s in MEMBERS for r in MEMBERS if s != r])


@pytest.mark.trap(36, 39)
@given(some.integers(1, 2), some.lists(WAYS, max_size=25), some.data())
def test_everything_arrives_in_order_whatever_messages_overtake_each_other(
    places: int, ways: list[tuple[str, str]], data: some.DataObject
) -> None:
    world, wanted, numbers = World(places), dict[tuple[str, str], list[int]](), count()
    for name in MEMBERS:
        world.add(name)
    for sender, receiver in ways:
        item = (sender, receiver, next(numbers))
        world.out[sender].put(receiver, item)
        wanted.setdefault((sender, receiver), []).append(item[2])
    world.run(data)
    assert world.arrived == wanted


@given(some.lists(WAYS, min_size=1, max_size=12), some.data())
def test_what_is_taken_back_never_arrives_and_the_rest_does(ways: list[tuple[str, str]], data: some.DataObject) -> None:
    world, wanted = World(1), dict[tuple[str, str], list[int]]()
    for name in MEMBERS:
        world.add(name)
    items = [(sender, receiver, number) for number, (sender, receiver) in enumerate(ways)]
    for item in items:
        world.out[item[0]].put(item[1], item)
    for name in MEMBERS:
        world.settle(name)
    for _ in range(data.draw(some.integers(0, 6))):
        busy = sorted(wire for wire, words in world.wires.items() if words)
        if busy:
            world.deliver(*data.draw(some.sampled_from(busy)))
    taken = data.draw(some.sets(some.sampled_from(items)))
    gone = set()
    for item in sorted(taken):
        sender, receiver, number = item
        turn = world.out[sender].turns.get(receiver)
        under_way = turn is not None and turn.under_way and item in turn.items
        if under_way or number in world.arrived.get((sender, receiver), []):
            continue
        withdrawn = world.out[sender].cancel(receiver, item)
        if withdrawn is not None:
            world.say(sender, receiver, "withdrawn", withdrawn.number, [])
        gone.add(item)
    world.run(data)
    for sender, receiver, number in items:
        if (sender, receiver, number) not in gone:
            wanted.setdefault((sender, receiver), []).append(number)
    assert world.arrived == wanted


def test_peers_are_asked_in_the_order_given_and_else_as_things_came() -> None:
    plain: Outgoing[int] = Outgoing(2, 1, lambda item: 0)
    for peer, item in (("c", 1), ("a", 2), ("b", 3), ("c", 4)):
        plain.put(peer, item)
    assert [(turn.peer, turn.items) for turn in plain.asks()] == [("c", [1]), ("a", [2])]
    plain.ended("c")
    assert [turn.peer for turn in plain.asks()] == ["c"]
    ordered: Outgoing[int] = Outgoing(1, 1, lambda item: 0, order=lambda peer: {"a": 2, "b": 0, "c": 1}[peer])
    for peer in "abc":
        ordered.put(peer, 0)
    assert [turn.peer for turn in ordered.asks()] == ["b"]


def test_items_of_different_kinds_are_not_in_one_turn_and_a_turn_is_bounded() -> None:
    out: Outgoing[tuple[str, int]] = Outgoing(1, 3, lambda item: item[0])
    for item in (("x", 1), ("x", 2), ("y", 3), ("y", 4), ("y", 5), ("y", 6)):
        out.put("b", item)
    seen = []
    while turns := out.asks():
        seen.append([number for _, number in turns[0].items])
        out.ended("b")
    assert seen == [[1, 2], [3, 4, 5], [6]]


def test_an_ask_that_is_not_ready_lets_others_pass_and_one_not_wanted_is_refused() -> None:
    into: Incoming[str] = Incoming(1)
    for peer in "abc":
        into.asked(peer, 1, [peer])
    assert [turn.peer for turn in into.grants(lambda turn: turn.peer != "a")] == ["b"]
    assert into.grants(lambda turn: True) == []
    assert [turn.peer for turn in into.refuse(lambda turn: turn.peer == "a")] == ["a"]
    into.ended("b")
    assert [turn.peer for turn in into.grants(lambda turn: True)] == ["c"]
    assert into.goes("c", 2) is None
    assert into.goes("a", 1) is None
