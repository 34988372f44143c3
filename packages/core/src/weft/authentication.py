"""Who may speak for a job: whoever knows its secret. Codes are HMAC-SHA256 (RFC 2104); nothing here encrypts.

From the secret comes one key per job, and from that one per purpose and pair of members, each the HMAC of its name
under the key above it (as HKDF expands, RFC 5869). What is known under one key says nothing about another, so what was
said in one job, in one direction, by one life of a member is nothing anywhere else.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weft.errors import ConfigError, PeerLostError
from weft.member import Tag

FEWEST_BYTES = 16
"""Shorter secrets can be guessed."""
SHORTEST_CODE_BYTES = 16
"""What signals carry of their codes."""
MOST_BYTES = 1 << 16
"""A file that has more is not one of a secret."""
_NONCE_BYTES = 16
_NUMBER_BYTES = 8


class Secret:
    """The secret of a job. No repr, message or error shows it; it can be pickled, to reach a job's other processes."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes | str) -> None:
        """Text stands for its bytes in the environment, UTF-8 as a rule. Raises `ConfigError` for less than 16 bytes,
        and for what is neither.
        """
        if not isinstance(value, str | bytes):
            raise ConfigError(f"the job secret is of type {type(value).__name__}, expected text or bytes")
        self._value = os.fsencode(value) if isinstance(value, str) else value
        if len(self._value) < FEWEST_BYTES:
            raise ConfigError(
                f"the job secret has {len(self._value)} bytes, expected at least {FEWEST_BYTES}: "
                "make one with `openssl rand -hex 32`"
            )

    @classmethod
    def read(cls, file: str | Path) -> Secret:
        """From a file, without white space around it. Raises `ConfigError` for one that cannot be read, or is none."""
        try:
            with Path(file).open("rb") as stream:
                data = stream.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the job secret in {file} cannot be read: {error}") from error
        if len(data) > MOST_BYTES:
            raise ConfigError(f"the job secret in {file} has over {MOST_BYTES} bytes: it must be a secret alone")
        return cls(data.strip())

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Secret | None:
        """From `WEFT_SECRET`, or the file that `WEFT_SECRET_FILE` names; None without either.

        Raises `ConfigError` for both at once, and for what is no secret.
        """
        value, file = environment.get("WEFT_SECRET"), environment.get("WEFT_SECRET_FILE")
        if value is not None and file is not None:
            raise ConfigError("WEFT_SECRET and WEFT_SECRET_FILE are both set: unset one")
        if value is not None:
            return cls(value)
        return None if file is None else cls.read(file)

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(self._value)

    def key(self, job: str) -> Key:
        """The key of a job."""
        return Key(self._value).derived(b"weft", job.encode())


class Key:
    """A key for one purpose. Its repr does not show it."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "Key(…)"

    def derived(self, *name: bytes) -> Key:
        """The key below this one that has a name; no two names, whatever their parts, have the same."""
        return Key(self.code(*name))

    def code(self, *parts: bytes) -> bytes:
        """32 bytes that only who has the key can make for these parts. Where a part ends counts."""
        return hmac.digest(self._value, b"".join(len(part).to_bytes(8, "little") + part for part in parts), "sha256")

    def fits(self, code: bytes, *parts: bytes) -> bool:
        """Whether a code, or its first 16 bytes and more, is that of these parts; takes as long for any wrong one."""
        return len(code) >= SHORTEST_CODE_BYTES and hmac.compare_digest(self.code(*parts)[: len(code)], code)


@dataclass(slots=True)
class _Direction:
    """What one end says to the other, or hears from it."""

    signals: Key
    notes: Key
    next: int = 0
    """Number of the next signal, or the least that it may have; signals come in the order in which they were sent."""
    buckets: set[tuple[int, int]] = field(default_factory=set)
    """(version, bucket) of the notes that were heard."""


class Guard:
    """Signs what one life of a member says over the data channel, and checks what it hears.

    Every life has a random `nonce`, which its peers learn from its endpoint record. Keys are of two lives and one
    direction, so nothing that was said in another life, to somebody else, or in an earlier run is believed; within a
    life a signal is believed once, and so is the note of a bucket of a version.
    """

    def __init__(self, key: Key, me: str) -> None:
        self.nonce = secrets.token_bytes(_NONCE_BYTES)
        self._key, self._me = key, me
        self._to: dict[str, _Direction] = {}
        self._by: dict[str, _Direction] = {}

    def admit(self, peer: str, nonce: bytes) -> None:
        """From now on this is the peer's life. Raises `ConfigError` for one without a nonce."""
        if not nonce:
            raise ConfigError(f"the endpoint of {peer} has no nonce: use one version of weft in a job")
        mine, theirs = (self._me.encode(), self.nonce), (peer.encode(), nonce)
        self._to[peer], self._by[peer] = self._direction(*mine, *theirs), self._direction(*theirs, *mine)

    def _direction(self, *ends: bytes) -> _Direction:
        return _Direction(self._key.derived(b"signal", *ends), self._key.derived(b"note", *ends))

    def signal(self, peer: str, tag: Tag, body: bytes) -> bytes:
        """A signal's bytes: its number, 16 bytes of code, the body. Raises `PeerLostError` for who is not admitted."""
        way = self._way(peer)
        number = way.next.to_bytes(_NUMBER_BYTES, "little")
        way.next += 1
        return number + way.signals.code(_words(tag), number, body)[:SHORTEST_CODE_BYTES] + body

    def heard_signal(self, peer: str, tag: Tag, said: bytes) -> bytes | None:
        """The body of a signal; None when it is not the peer's, or was heard before."""
        way = self._by.get(peer)
        body_at = _NUMBER_BYTES + SHORTEST_CODE_BYTES
        number, code, body = said[:_NUMBER_BYTES], said[_NUMBER_BYTES:body_at], said[body_at:]
        if way is None or not way.signals.fits(code, _words(tag), number, body):
            return None
        found = int.from_bytes(number, "little")
        if found < way.next:
            return None
        way.next = found + 1
        return body

    def note(self, peer: str, tag: Tag, bucket: int, note: bytes) -> bytes:
        """A bucket's note with its code in front. Raises `PeerLostError` for who is not admitted."""
        return self._way(peer).notes.code(_words(tag), str(bucket).encode(), note)[:SHORTEST_CODE_BYTES] + note

    def heard_note(self, peer: str, tag: Tag, bucket: int, said: bytes) -> bytes | None:
        """The note; None when it is not the peer's, of this bucket and version, or was heard before."""
        way = self._by.get(peer)
        code, note = said[:SHORTEST_CODE_BYTES], said[SHORTEST_CODE_BYTES:]
        if way is None or not way.notes.fits(code, _words(tag), str(bucket).encode(), note):
            return None
        if (tag.version, bucket) in way.buckets:
            return None
        way.buckets.add((tag.version, bucket))
        return note

    def forget(self, oldest: int) -> None:
        """No note of a version before this one is looked at any more."""
        for way in self._by.values():
            way.buckets = {heard for heard in way.buckets if heard[0] >= oldest}

    def _way(self, peer: str) -> _Direction:
        if peer not in self._to:
            raise PeerLostError(peer, "it has not said how it is reached")
        return self._to[peer]


def _words(tag: Tag) -> bytes:
    return f"{tag.version} {tag.incarnation} {tag.memory_epoch} {tag.sender}".encode()
