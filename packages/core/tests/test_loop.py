"""A member's waits: who is asked when."""

from __future__ import annotations

from collections.abc import Sequence

from weft.contracts import Message
from weft.deadline import Deadline
from weft.loop import Loop
from weft.member import Member
from weft.wire import Notice, Wire

ME = Member("me", None, None, None, 0, "here", "here", "cpu")


class Quiet:
    """A transport over which nothing ever comes. It lets nobody wait for longer than it takes to say so."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def poll(self) -> Sequence[Message]:
        self.asked.append("poll")
        return ()


class Waited(Quiet):
    def wait(self, seconds: float) -> None:
        self.asked.append("wait")


def test_a_transport_that_can_be_waited_for_is_polled_once_after_every_wait() -> None:
    transport = Waited()
    loop = Loop(Wire(transport, ME, [ME]))  # type: ignore[arg-type]
    loop.until(lambda: len(transport.asked) > 20, lambda: None, Deadline.after(60), "many polls", list)
    assert transport.asked[:6] == ["poll", "wait"] * 3


def test_other_transports_are_polled_again_and_again() -> None:
    transport = Quiet()
    loop = Loop(Wire(transport, ME, [ME]))  # type: ignore[arg-type]
    loop.until(lambda: len(transport.asked) > 20, lambda: None, Deadline.after(60), "many polls", list)


def test_nobody_waits_before_having_looked_at_what_it_told_itself() -> None:
    transport = Waited()
    wire = Wire(transport, ME, [ME])  # type: ignore[arg-type]
    seen: list[Notice] = []

    def step() -> None:
        seen.extend(notice for _, notice in wire.take(1, "hello"))
        if transport.asked == ["poll", "wait", "poll"]:
            wire.tell("me", 1, Notice("hello"))

    Loop(wire).until(lambda: bool(seen), step, Deadline.after(60), "a notice", list)
    assert transport.asked == ["poll", "wait", "poll", "poll"]
