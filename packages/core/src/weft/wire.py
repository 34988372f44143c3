"""What arrives at one member: sorted by version, strangers and the dead filtered out."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping

import msgspec

from weft.contracts import Message, Transport
from weft.errors import PeerLostError
from weft.member import Member, Tag
from weft.records import decoded

_TEXT_CHARACTERS = 15_000
"""Longer reasons are cut, so that a notice fits a signal."""


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """The content of a control signal. New fields go to the end, with defaults."""

    kind: str
    """Which step of the protocol (see `weft.session`)."""
    replica: str = ""
    text: str = ""
    numbers: tuple[int, ...] = ()


class Wire:
    """One member's connection to all others: signals and arrivals of the version at hand."""

    def __init__(self, transport: Transport, me: Member, members: Iterable[Member]) -> None:
        self.transport = transport
        self.me = me
        self._members: Mapping[str, Member] = {member.name: member for member in members}
        self._arrivals: dict[int, deque[Message]] = defaultdict(deque)
        self._notices: dict[int, list[tuple[str, Notice]]] = defaultdict(list)
        self._oldest = 0
        self._lost: dict[str, PeerLostError] = {}
        self.dropped = 0
        """Messages of finished versions, former incarnations or strangers that were not delivered (traps 35, 46,
        64).
        """

    def tag(self, version: int) -> Tag:
        """The tag of this member's messages about a version."""
        return Tag(version, self.me.name, self.me.incarnation, self.me.memory_epoch)

    def tell(self, peer: str, version: int, notice: Notice) -> None:
        """Send a notice; to oneself too, so that a leader counts itself like everybody else.

        A peer that is gone is noted: those who need it find it in `check` and `lost`, and the others are told still.
        """
        if len(notice.text) > _TEXT_CHARACTERS:
            notice = msgspec.structs.replace(notice, text=notice.text[:_TEXT_CHARACTERS] + "…")
        if peer == self.me.name:
            self._notices[version].append((peer, notice))
            return
        try:
            self.transport.signal(peer, self.tag(version), msgspec.msgpack.encode(notice))
        except PeerLostError as error:
            self._lost[error.peer] = error

    def pump(self) -> bool:
        """Take in what has arrived; says whether there was anything."""
        try:
            messages = self.transport.poll()
        except PeerLostError as error:
            self._lost[error.peer] = error
            return True
        for message in messages:
            self._sort(message)
        return bool(messages)

    def _sort(self, message: Message) -> None:
        tag = message.tag
        sender = self._members.get(tag.sender)
        life = sender and Tag(tag.version, message.peer, sender.incarnation, sender.memory_epoch)
        if tag != life or tag.version < self._oldest:
            self.dropped += 1
        elif message.bucket is not None:
            self._arrivals[tag.version].append(message)
        else:
            notice = decoded(Notice, message.note, f"signal of {message.peer} is not a notice")
            self._notices[tag.version].append((message.peer, notice))

    def arrivals(self, version: int) -> list[Message]:
        """Buckets of a version that have arrived since the last call."""
        queue = self._arrivals[version]
        taken = list(queue)
        queue.clear()
        return taken

    def take(self, version: int, *kinds: str) -> list[tuple[str, Notice]]:
        """Remove and return the notices of these kinds, with their senders."""
        notices = self._notices[version]
        taken = [entry for entry in notices if entry[1].kind in kinds]
        self._notices[version] = [entry for entry in notices if entry[1].kind not in kinds]
        return taken

    def check(self, peers: Callable[[], Iterable[str]]) -> None:
        """Raise `PeerLostError` when one of these peers is known to be gone."""
        if self._lost and (lost := self.lost(peers())):
            raise lost[0]

    def lost(self, peers: Iterable[str]) -> list[PeerLostError]:
        """The losses known among these peers, by name."""
        return [self._lost[peer] for peer in sorted(set(peers) & set(self._lost))]

    def newest(self, kind: str) -> int | None:
        """The newest version for which a notice of this kind is waiting."""
        versions = [v for v, notices in self._notices.items() if any(n.kind == kind for _, n in notices)]
        return max(versions, default=None)

    def finish(self, version: int) -> None:
        """Forget a version; what still comes for it is dropped."""
        self._oldest = max(self._oldest, version + 1)
        for version in [v for v in self._arrivals if v < self._oldest]:
            del self._arrivals[version]
        for version in [v for v in self._notices if v < self._oldest]:
            del self._notices[version]
