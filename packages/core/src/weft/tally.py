"""Whether members agree, and whether all are there: kept up while they come and go, at the same cost however many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)


class Entry:
    """What counts of one member."""

    __slots__ = ("agreed", "expect", "replica", "size", "source")

    def __init__(
        self, agreed: tuple[Hashable, ...], expect: tuple[int, int], source: bool, replica: str | None, size: int
    ) -> None:
        self.agreed = agreed
        """Values that must be equal on all members, each equal to the one in its place."""
        self.expect = expect
        """Sources and replicas that it expects."""
        self.source = source
        self.replica = replica
        """None for one that is no target."""
        self.size = size
        """Members of its replica."""


class _Filled(Enum):
    SHORT = "short"
    WHOLE = "whole"
    WRONG = "wrong"
    """Its members are too many, or tell different sizes."""


@dataclass(slots=True, eq=False)
class Tally:
    """All members that are there."""

    _sources: int = 0
    _expect: Counter[tuple[int, int]] = field(default_factory=Counter)
    _agreed: dict[int, Counter[Hashable]] = field(default_factory=dict)
    _differing: int = 0
    """Places of `Entry.agreed` in which there is more than one value."""
    _replicas: dict[str, Counter[int]] = field(default_factory=dict)
    """Members by the size that they tell, per replica."""
    _filled: Counter[_Filled] = field(default_factory=Counter)
    """Replicas."""

    def add(self, entry: Entry) -> None:
        """A member has come."""
        self._change(entry, 1)

    def remove(self, entry: Entry) -> None:
        """A member that was added has gone."""
        self._change(entry, -1)

    @property
    def contradicts(self) -> bool:
        """Whether they cannot come together, however many more come."""
        if self._differing or len(self._expect) > 1 or self._filled[_Filled.WRONG]:
            return True
        return any(self._sources > sources or len(self._replicas) > replicas for sources, replicas in self._expect)

    @property
    def whole(self) -> bool:
        """Whether exactly the expected ones are there."""
        if not self._expect or self.contradicts or self._filled[_Filled.SHORT]:
            return False
        return all((self._sources, len(self._replicas)) == expect for expect in self._expect)

    def _change(self, entry: Entry, step: int) -> None:
        self._sources += step * entry.source
        _count(self._expect, entry.expect, step)
        for place, value in enumerate(entry.agreed):
            values = self._agreed.setdefault(place, Counter())
            before = len(values) > 1
            _count(values, value, step)
            self._differing += (len(values) > 1) - before
        if entry.replica is not None:
            sizes = self._replicas.setdefault(entry.replica, Counter())
            if sizes:
                self._filled[_filled(sizes)] -= 1
            _count(sizes, entry.size, step)
            if sizes:
                self._filled[_filled(sizes)] += 1
            else:
                del self._replicas[entry.replica]


def _count(values: Counter[Value], value: Value, step: int) -> None:
    values[value] += step
    if not values[value]:
        del values[value]


def _filled(sizes: Counter[int]) -> _Filled:
    if len(sizes) > 1:
        return _Filled.WRONG
    ((size, count),) = sizes.items()
    return _Filled.WHOLE if count == size else _Filled.SHORT if count < size else _Filled.WRONG
