"""How all members of a world find each other in a store: PE 0 collects who they are, and publishes what all need."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError
from weft.records import decoded

_LOOK_SECONDS = 0.02

Record = TypeVar("Record")


class Guest(msgspec.Struct, frozen=True, array_like=True):
    """Who comes."""

    name: str
    sends: bool
    receives: bool


class World(msgspec.Struct, frozen=True, array_like=True):
    """Who has come. A member's PE number is its place."""

    guests: tuple[Guest, ...]
    unique_id: bytes
    """NVSHMEM's."""

    def number_of(self, name: str) -> int:
        """A member's PE. Raises `ConfigError` for a stranger."""
        for number, guest in enumerate(self.guests):
            if guest.name == name:
                return number
        raise ConfigError(f"{name} is none of the {len(self.guests)} members of this NVSHMEM world")


def meet(
    store: Store, world: str, guest: Guest, members: int, unique_id: Callable[[], bytes], deadline: Deadline
) -> World:
    """The world, once all members have come. Each makes two or three store operations and polls for one key.

    Raises `DeadlineError` with how many are missing, and `ConfigError` when more have come than there are members, as
    when the name of a world is used twice.
    """
    prefix = f"nvshmem/{world}"
    place = store.add(f"{prefix}/count", 1) - 1
    if place >= members:
        raise ConfigError(f"NVSHMEM world {world!r} has {members} members already: give every start a new name")
    if place:
        store.set(f"{prefix}/guest/{place}", msgspec.msgpack.encode(guest))
        made = _read(store, f"{prefix}/world", World, deadline, "PE 0 of the world")
    else:
        others = [
            _read(store, f"{prefix}/guest/{number}", Guest, deadline, f"member {number + 1} of {members}")
            for number in range(1, members)
        ]
        made = World((guest, *others), unique_id())
        store.set(f"{prefix}/world", msgspec.msgpack.encode(made))
    names = [each.name for each in made.guests]
    if len(set(names)) < len(names):
        raise ConfigError(f"NVSHMEM world {world!r} has two members of one name: {', '.join(sorted(names))}")
    return made


def _read(store: Store, key: str, kind: type[Record], deadline: Deadline, whom: str) -> Record:
    while (found := store.get(key)) is None:
        if deadline.expired():
            raise DeadlineError("making the NVSHMEM world", deadline.seconds, [whom])
        time.sleep(_LOOK_SECONDS)
    return decoded(kind, found, f"{key} in the store is no record of an NVSHMEM world")
