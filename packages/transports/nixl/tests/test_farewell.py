"""The last word of who closes comes after everything that was said before, even where it arrives earlier."""

from typing import Any

import pytest

from weft.deadline import Deadline
from weft.errors import PeerLostError
from weft.member import Member, Tag
from weft_nixl import factory

_CALLS = 5


class Late:
    """Notifications in another order: what is said before a farewell comes some calls after it."""

    def __init__(self, agent: Any) -> None:
        self._receive, self._held, self._calls = agent.get_new_notifs, {}, 0
        self._parted = False
        agent.get_new_notifs = self

    def __call__(self) -> dict[str, list[bytes]]:
        now: dict[str, list[bytes]] = {}
        for name, said in self._receive().items():
            for each in said:
                self._parted |= each.startswith(b".")
                kept = now if each[:1] in b".?" else self._held
                kept.setdefault(name, []).append(each)
        self._calls += self._parted
        if self._calls > _CALLS:
            now, self._held = {**now, **self._held}, {}
        return now


@pytest.mark.trap(48)
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_farewell_that_overtakes_waits_for_what_was_said_before(direction: str) -> None:
    """As it may with several UCX workers, of which every thread uses another."""
    members = [Member(name, None, None, None, 0, "here", "here", "cpu") for name in ("sender", "receiver")]
    ends: list[Any] = [factory({"direction": direction}) for _ in members]
    sender, receiver = ends
    for end, member in zip(ends, members, strict=True):
        end.open(member)
    sender.connect(members[1], receiver.address(), Deadline.after(60))
    receiver.connect(members[0], sender.address(), Deadline.after(60))
    with receiver._lock:
        late = Late(receiver._agent)
    notes = [bytes([number]) for number in range(3)]
    for note in notes:
        sender.signal("receiver", Tag(1, "sender", 0, 0), note)
    sender.close()
    found: list[bytes] = []

    def lost() -> bool:
        try:
            found.extend(message.note for message in receiver.poll())
        except PeerLostError:
            return True
        return False

    Deadline.after(60).wait(lost, "the loss of the sender", list)
    assert late._calls > _CALLS
    assert found == notes
    receiver.close()
