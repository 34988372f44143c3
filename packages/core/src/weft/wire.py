"""What arrives at one member: sorted by version, strangers and the dead filtered out."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping

import msgspec

from weft.authentication import Guard
from weft.contracts import Message, Transport
from weft.errors import PeerLostError, RecordError
from weft.member import Member, Tag
from weft.records import decoded

_LOG = logging.getLogger(__name__)
_TEXT_CHARACTERS = 15_000
"""Longer reasons are cut, so that a notice fits a signal."""
_NUMBERS = {"credit": (2,), "commit": (2,), "outcome": (1, 3), "replica-outcome": (1, 3), "roll": (1,), "want": (1, 2)}
"""How many numbers come with notices of these kinds."""


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """The content of a control signal. New fields go to the end, with defaults."""

    kind: str
    """Which step of the protocol (see `weft.protocol`)."""
    replica: str = ""
    text: str = ""
    numbers: tuple[int, ...] = ()


class Wire:
    """One member's connection to all others: signals and arrivals of the version at hand."""

    def __init__(self, transport: Transport, me: Member, members: Iterable[Member], guard: Guard | None = None) -> None:
        """With a guard, that of a job with a secret, only what it recognizes is delivered."""
        self.transport = transport
        self.me = me
        self._guard = guard
        self._impersonated: set[str] = set()
        self._members: Mapping[str, Member] = {member.name: member for member in members}
        self._arrivals: dict[int, deque[Message]] = defaultdict(deque)
        self._notices: dict[int, list[tuple[str, Notice]]] = defaultdict(list)
        self._oldest = 0
        self._lost: dict[str, PeerLostError] = {}
        self.told_itself = False
        """Whether this member has told itself anything since the last `pump`."""
        self.dropped = 0
        """Messages of finished versions, former incarnations or strangers that were not delivered (traps 35, 46,
        64), and those that the guard did not recognize.
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
            self.told_itself = True
            return
        tag, said = self.tag(version), msgspec.msgpack.encode(notice)
        try:
            self.transport.signal(peer, tag, self._guard.signal(peer, tag, said) if self._guard else said)
        except PeerLostError as error:
            self._lost[error.peer] = error.again()

    def note(self, peer: str, version: int, bucket: int, note: bytes) -> bytes:
        """What to post with a bucket so that the peer gets this note."""
        return self._guard.note(peer, self.tag(version), bucket, note) if self._guard else note

    def pump(self) -> bool:
        """Take in what has arrived; says whether there was anything."""
        self.told_itself = False
        try:
            messages = self.transport.poll()
        except PeerLostError as error:
            self._lost[error.peer] = error.again()
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
            return
        if self._guard is not None:
            recognized = self._recognized(self._guard, message)
            if recognized is None:
                self.dropped += 1
                return
            message = recognized
        if message.bucket is not None:
            self._arrivals[tag.version].append(message)
        else:
            notice = decoded(Notice, message.note, f"signal of {message.peer} is not a notice")
            if len(notice.numbers) not in _NUMBERS.get(notice.kind, (len(notice.numbers),)):
                raise RecordError(
                    f"signal of {message.peer} is not a notice: {notice.kind!r} with {len(notice.numbers)} numbers"
                )
            self._notices[tag.version].append((message.peer, notice))

    def _recognized(self, guard: Guard, message: Message) -> Message | None:
        """The message without its code; None, with a warning once per peer, for a wrong code and what is repeated."""
        peer, tag, bucket = message.peer, message.tag, message.bucket
        if bucket is None:
            note = guard.heard_signal(peer, tag, message.note)
        else:
            note = guard.heard_note(peer, tag, bucket, message.note)
        if note is None:
            what = "a signal" if bucket is None else f"bucket {bucket}"
            level = logging.DEBUG if peer in self._impersonated else logging.WARNING
            words = "%s of version %d in the name of %s is not from it, or old: dropped"
            _LOG.log(level, words, what, tag.version, peer)
            self._impersonated.add(peer)
            return None
        return dataclasses.replace(message, note=note)

    def arrivals(self, version: int) -> list[Message]:
        """Buckets of a version that have arrived since the last call."""
        queue = self._arrivals[version]
        taken = list(queue)
        queue.clear()
        return taken

    def take(self, version: int, *kinds: str) -> list[tuple[str, Notice]]:
        """Remove and return the notices of these kinds, with their senders."""
        notices = self._notices.get(version)
        if not notices:
            return []
        taken = [entry for entry in notices if entry[1].kind in kinds]
        self._notices[version] = [entry for entry in notices if entry[1].kind not in kinds]
        return taken

    def check(self, peers: Callable[[], Iterable[str]]) -> None:
        """Raise `PeerLostError` when one of these peers is known to be gone."""
        if self._lost and (lost := self.lost(peers())):
            raise lost[0].again()

    @property
    def any_lost(self) -> bool:
        """Whether any loss is known: cheap to ask at every step, unlike whose loss would matter."""
        return bool(self._lost)

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
        if self._guard is not None:
            self._guard.forget(self._oldest)
        for version in [v for v in self._arrivals if v < self._oldest]:
            del self._arrivals[version]
        for version in [v for v in self._notices if v < self._oldest]:
            del self._notices[version]
