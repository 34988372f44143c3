"""What a holder says of itself in the store, and what it has heard of its versions' digests."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import msgspec

from weft.errors import WeftError
from weft.heartbeat import Heartbeat
from weft.publication.holders import Directory, Holder, Kept
from weft.publication.readers import Readers


class Listing:
    """A holder's entry in the directory, kept alive. Only the member of rank 0 lists what all of them hold."""

    def __init__(self, directory: Directory, holder: Holder) -> None:
        """`holder` is what stays as it is."""
        self._directory, self._holder = directory, holder
        self._heart = Heartbeat(f"holder {holder.name}")
        self._noting = threading.Lock()
        self._found: dict[tuple[int, str], str] = {}
        self._digests: dict[int, tuple[str, str]] = {}
        self._said: Holder | None = None

    def touch(self, seconds: float) -> None:
        """See `Heartbeat.touch`."""
        self._heart.touch(seconds)

    def say(self, readers: Sequence[Readers]) -> None:
        """Say what is held, from the newest copy to the others, and by how many it is read; if that has changed."""
        with self._noting:
            newest, *others = (
                Kept(each.copy.version, each.fleet, *self._digests.get(each.copy.version, ("", "")))
                for each in readers
            )  # fmt: skip
        old = sorted((each for each in others if each.version >= 0), key=lambda each: -each.version)
        holder = msgspec.structs.replace(
            self._holder, version=newest.version, digest=newest.digest, tensors=newest.tensors, kept=tuple(old),
            readers=sum(each.admitted for each in readers),
        )  # fmt: skip
        if holder != self._said:
            self._heart.hold(partial(self._directory.say, holder))
            self._said = holder

    def note(self, version: int, digest: str, tensors: str, oldest: int) -> None:
        """What the digest of a version is in somebody who has read it, and of which tensors. `oldest` is the oldest
        version that is still held. Raises `WeftError` when others have found another digest of the same tensors.
        """
        with self._noting:
            known = self._found.setdefault((version, tensors), digest)
            self._digests.setdefault(version, (digest, tensors))
            self._found = {each: of for each, of in self._found.items() if each[0] >= oldest}
            self._digests = {each: of for each, of in self._digests.items() if each >= oldest}
        if known != digest:
            raise WeftError(
                f"version {version} of {self._holder.name} has digest {known}, but {digest} in a replica that has read "
                "it later: the copy has changed while it was served"
            )

    def end(self) -> None:
        """Nothing is held any more. Idempotent."""
        self._heart.end()
