"""Slots: whatever order two streams run in and messages between them arrive, no batch is overwritten or read early."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as some

from weft.networks import DEPTH
from weft_nvshmem import slots


@pytest.mark.trap(34, 35, 67)
@given(some.integers(0, 20), some.data())
def test_batches_arrive_in_order_however_the_streams_run(count: int, data: some.DataObject) -> None:
    staging, memory = [-1] * DEPTH, [-1] * DEPTH
    filled, freed = [0], [0]
    arrived: list[int] = []
    # What a stream does next once its condition holds; what is on the way to the other end, in order.
    to_receiver: deque[Callable[[], None]] = deque()
    to_sender: deque[Callable[[], None]] = deque()

    def put(number: int) -> tuple[Callable[[], bool], Callable[[], None]]:
        step = slots.put(number)

        def act() -> None:
            staging[step.slot] = number
            value = staging[step.slot]

            def land() -> None:
                memory[step.slot] = value
                filled[0] = step.signal

            to_receiver.append(land)

        return lambda: freed[0] >= step.wait, act

    def take(number: int) -> tuple[Callable[[], bool], Callable[[], None]]:
        step = slots.take(number)

        def act() -> None:
            arrived.append(memory[step.slot])
            to_sender.append(lambda: freed.__setitem__(0, step.signal))

        return lambda: filled[0] >= step.wait, act

    sender, receiver = deque(map(put, range(count))), deque(map(take, range(count)))
    while True:
        able: list[Callable[[], None]] = []
        for stream in (sender, receiver):
            if stream and stream[0][0]():
                able.append(lambda stream=stream: stream.popleft()[1]())  # type: ignore[misc]
        able += [lambda wire=wire: wire.popleft()() for wire in (to_receiver, to_sender) if wire]  # type: ignore[misc]
        if not able:
            break
        data.draw(some.sampled_from(able))()
    assert arrived == list(range(count)), "a batch was lost, repeated, overwritten or read before it came"
    assert not sender, "the streams wait for each other"


def test_two_batches_may_be_under_way_before_anything_was_unpacked() -> None:
    assert [slots.put(number).wait for number in range(4)] == [0, 0, 1, 2]
    assert [slots.put(number).slot for number in range(4)] == [0, 1, 0, 1]
