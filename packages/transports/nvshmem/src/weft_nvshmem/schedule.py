"""Who puts to whom in which round: in each, everybody sends to one at most and receives from one at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The rounds between these members; a member may be on both sides.

    Sender number s and receiver number r meet in round (r - s) modulo the larger side's size. A sender has each of its
    receivers in another round and a receiver each of its senders, so no pattern within it has a conflict or more rounds
    than that. An all-to-all of n has n - 1 rounds, since in round 0 everybody would meet itself.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]

    @classmethod
    def of(cls, roles: Sequence[tuple[str, bool, bool]]) -> Schedule:
        """From every member's name and whether it sends and receives; the same for any order of them."""
        ordered = sorted(roles)
        return cls(tuple(n for n, sends, _ in ordered if sends), tuple(n for n, _, takes in ordered if takes))

    def round_of(self, sender: str, receiver: str) -> int:
        """When they meet. Whoever is not on that side counts as the first of it."""
        s = self.senders.index(sender) if sender in self.senders else 0
        r = self.receivers.index(receiver) if receiver in self.receivers else 0
        return (r - s) % max(len(self.senders), len(self.receivers), 1)

    def rounds(self, pattern: Sequence[Pair]) -> list[list[Pair]]:
        """These (sender, receiver) pairs by round, without rounds in which nobody meets."""
        found: dict[int, list[Pair]] = {}
        for sender, receiver in pattern:
            found.setdefault(self.round_of(sender, receiver), []).append((sender, receiver))
        return [found[number] for number in sorted(found)]
