"""Everything weft raises. One class per kind of remedy, never one per call site."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Self


class WeftError(Exception):
    """Base of every error that weft raises on purpose. All of them survive pickling, so that pools and actors that
    carry exceptions between processes deliver them whole.
    """

    def again(self) -> Self:
        """The same words, to keep or to raise: a kept error would collect the frames that it is raised in, and they all
        that they use, weights and staging included.
        """
        return copy(self)

    def __reduce__(self) -> tuple[object, ...]:
        """Words and attributes, without the class's own constructor, which takes something else than the words."""
        return _restored, (type(self), self.args), self.__dict__


class LayoutError(WeftError):
    """A layout contradicts itself: the caller built it wrongly. Lists every fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(_numbered("the layout is invalid", self.faults))


class PlanError(WeftError):
    """The two sides do not fit together. Lists every fault by tensor, member and dimension; nothing was moved."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(_numbered("no plan is possible", self.faults))


class NotSupportedError(WeftError):
    """The feature has its place in weft but is not built yet; the message names it and what to use instead."""


class ConfigError(WeftError):
    """An argument, address or option is wrong; the message says what was expected."""


class PluginError(WeftError):
    """A plug-in is not installed, does not import, or is claimed by two distributions."""


class RecordError(WeftError):
    """Bytes from the store or a peer are not the record they should be (size, schema, format version)."""


class StoreError(WeftError):
    """The store cannot be reached or refused an operation; names its address."""


class TransportError(WeftError):
    """The transport failed for a reason that is not one peer's absence."""


class PeerLostError(TransportError):
    """A peer's process or link is gone. `peer` is its member name."""

    def __init__(self, peer: str, detail: str) -> None:
        self.peer = peer
        super().__init__(f"lost {peer}: {detail}")


class DeadlineError(WeftError):
    """A wait ended without its event. `late` names whom it waited for."""

    def __init__(self, what: str, seconds: float, late: Sequence[str]) -> None:
        self.what, self.seconds, self.late = what, seconds, tuple(late)
        names = ", ".join(self.late) if self.late else "nobody in particular"
        super().__init__(f"{what}: not within {seconds:.1f} s; late: {names}")


class RendezvousError(WeftError):
    """Members could not agree on who takes part (wrong count, duplicate name, different policy or weft version)."""


class RefitAbortedError(WeftError):
    """One refit was given up; `version` was not installed and `reasons` holds every member's own words."""

    def __init__(self, version: int, reasons: Sequence[str]) -> None:
        self.version, self.reasons = version, tuple(reasons)
        super().__init__(_numbered(f"version {version} was not installed", self.reasons))


def _restored(kind: type[WeftError], words: tuple[object, ...]) -> WeftError:
    error = kind.__new__(kind)
    error.args = words
    return error


def _numbered(head: str, faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return f"{head}: {faults[0]}"
    return "\n".join([f"{head} ({len(faults)} faults):", *(f"  {i}. {fault}" for i, fault in enumerate(faults, 1))])
