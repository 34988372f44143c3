"""Who holds which version of a job, and whom a replica reads from.

Keys, below `weft/<job>/`:

- `holder/<name>`: a lease per holder; `news`: the newest version that the trainer has ever held, so that who waits
  for a newer one asks nobody until there is one;
- `chosen/<replica>`: from whom the replica reads next, as its first member has chosen;
- `wants/<replica>/<rank>`: the address of what a member of a replica wants; `layouts`: contents, by their addresses.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from urllib.parse import quote

import msgspec

from weft.content import get_content, put_content
from weft.contracts import StoreLease
from weft.deadline import Deadline
from weft.errors import DeadlineError, RefitAbortedError
from weft.facts import Facts
from weft.job_store import JobStore
from weft.layout import Layout
from weft.records import decoded

LEASE_SECONDS = 20.0
"""After so long without a sign of life a holder is not asked any more."""
_LOOK_SECONDS = 1.0
"""Between looks at holders of whom none will do: a lease ends in silence."""
_SHOWN_FAULTS = 5
_TENSORS_DIGITS = 32


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """An old version that a holder keeps. New fields go to the end, with defaults."""

    version: int
    job: str
    """The fleet in which it is served."""
    digest: str = ""
    tensors: str = ""
    """As in `Holder`."""


class Holder(msgspec.Struct, frozen=True, array_like=True):
    """What a holder says of itself. New fields go to the end, with defaults."""

    name: str
    job: str
    """The fleet in which it serves its newest version."""
    members: int
    version: int
    """The newest that it serves; -1 before the first."""
    digest: str = ""
    """Of that version, once somebody has read it: 32 hexadecimal digits."""
    host: str = ""
    domain: str = ""
    """Of its first member."""
    original: bool = True
    """Whether it is the trainer itself, and not a replica that has read the version elsewhere."""
    readers: int = 0
    """Replicas that it serves."""
    layouts: str = ""
    """Address of the list of its members' layouts."""
    facts: Facts = Facts()
    """What its first member runs on."""
    tensors: str = ""
    """Of which tensors the digest is: digests of others cannot be compared (`tensors_of`)."""
    kept: tuple[Kept, ...] = ()
    """Older versions, the newest of them first."""

    def versions(self) -> list[Holder]:
        """Every version that it has, the newest first, each as a holder of that one alone."""
        newest = [msgspec.structs.replace(self, kept=())] if self.version >= 0 else []
        return newest + [
            msgspec.structs.replace(
                self, version=old.version, job=old.job, digest=old.digest, tensors=old.tensors, kept=()
            )
            for old in self.kept
        ]  # fmt: skip


class Chosen(msgspec.Struct, frozen=True, array_like=True):
    """Whom a replica reads from next. New fields go to the end, with defaults."""

    number: int
    """Grows with every choice."""
    holder: Holder
    anew: bool
    """Whether members join the holder's fleet anew, since one of them has left it."""
    lives: tuple[bytes, ...] = ()
    """Of the members for whom it is, by rank: what each has said of itself when it came."""
    installed: int = -1
    """The version that the replica has installed last."""
    exact: int = -1
    """The version that it asks for; -1 for the newest."""
    gone: tuple[str, ...] = ()
    """Why nobody is chosen, where nobody is."""


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """What a member of a replica wants. New fields go to the end, with defaults."""

    layout: str
    """Its address."""
    life: bytes
    """Random, of this life of the member."""


Faults = Callable[[Holder], Sequence[str]]
"""What keeps a replica from reading from a holder; empty when nothing does."""
Prefer = Callable[[Sequence[Holder]], Holder]
"""Chooses among holders of the newest version; there is at least one."""


class Directory:
    """A job's holders, in the store."""

    def __init__(self, records: JobStore) -> None:
        self._records = records
        self._news, self._contents = f"{records.root}/news", f"{records.root}/layouts"
        self._said = -1

    def say(self, holder: Holder) -> StoreLease:
        """Say what a holder holds; renew the lease in time."""
        key = f"{self._records.root}/holder/{quote(holder.name, safe='')}"
        lease = self._records.lease("holder", key, holder, LEASE_SECONDS)
        if holder.original and holder.version > self._said:
            self._records.put("news", self._news, holder.version)
            self._said = holder.version
        return lease

    def holders(self) -> list[Holder]:
        """All that are alive, by name."""
        keys = self._records.store.keys(f"{self._records.root}/holder/")
        found = [self._records.find("holder", key, Holder) for key in keys]
        return [holder for holder in found if holder is not None]

    def newer(self, have: int, faults: Faults, deadline: Deadline) -> list[Holder]:
        """Those without faults whose newest version is newer than `have`, as soon as there is one. Raises
        `DeadlineError` that names everybody's versions, and faults.
        """
        news = have
        while True:
            limit = deadline if news == have else deadline.earlier(_LOOK_SECONDS)  # nobody rings when a lease ends
            newer = self._records.await_record("news", self._news, int, partial(operator.lt, news), limit)
            news = news if newer is None else newer
            holders = self.holders()
            able, said = _sorted([holder for holder in holders if holder.version > have], faults, holders)
            if able:
                return able
            if deadline.expired():
                late = [said.get(holder.name) or _has(holder) for holder in holders]
                raise DeadlineError(f"a version newer than {have}", deadline.seconds, late or ["nobody holds any"])

    def exactly(self, version: int, faults: Faults, deadline: Deadline) -> list[Holder]:
        """Those without faults that have this version, each as a holder of that one alone. One that is newer than all
        is waited for. Raises `DeadlineError`, and `RefitAbortedError` when nobody has it any more, or only with faults;
        both list who has which versions.
        """
        published = False
        while True:
            holders = self.holders()
            having = [each for holder in holders for each in holder.versions() if each.version == version]
            able, said = _sorted(having, faults, having)
            if able:
                return able
            others = [said.get(holder.name) or _has(holder) for holder in holders] or ["nobody holds any"]
            if published:
                raise RefitAbortedError(version, ["there is nobody to read it from", *others])
            if deadline.expired():
                raise DeadlineError(f"version {version}", deadline.seconds, others)
            limit = deadline.earlier(_LOOK_SECONDS)  # replicas that pass it on ring for nobody
            news = self._records.await_record("news", self._news, int, partial(operator.le, version), limit)
            published = news is not None

    def keep(self, data: bytes) -> str:
        """Keep content that many read; returns its address."""
        return put_content(self._records.store, self._contents, data)

    def layouts(self, addresses: Sequence[str]) -> dict[str, Layout]:
        """What was kept, by address. Raises `RecordError`."""
        return {each: Layout.decode(get_content(self._records.store, self._contents, each)) for each in addresses}

    def held(self, holder: Holder) -> dict[str, Layout]:
        """The layouts of a holder, by address; equal ones once."""
        listed = get_content(self._records.store, self._contents, holder.layouts)
        return self.layouts(decoded(list[str], listed, f"list of layouts of {holder.name}"))

    def want(self, replica: str, rank: int, layout: Layout, life: bytes) -> None:
        """Say what a member of a replica wants in this life of it."""
        self._records.put("wants", self._wants(replica, rank), Wanted(self.keep(layout.encoded), life))

    def wanted(self, replica: str, size: int, deadline: Deadline) -> list[Wanted]:
        """What all members of a replica want, by rank. Raises `DeadlineError` that names who has not come."""
        found: list[Wanted] = []
        for rank in range(size):
            said = self._records.await_record("wants", self._wants(replica, rank), Wanted, lambda _: True, deadline)
            if said is None:
                raise DeadlineError(f"all members of replica {replica}", deadline.seconds, [f"rank {rank}"])
            found.append(said)
        return found

    def choose(self, replica: str, chosen: Chosen) -> None:
        """Tell the other members of a replica."""
        self._records.put("chosen", self._chosen(replica), chosen)

    def chosen(self, replica: str) -> Chosen | None:
        """The last choice, if there was one."""
        return self._records.find("chosen", self._chosen(replica), Chosen)

    def await_choice(self, replica: str, meant: Callable[[Chosen], bool], deadline: Deadline) -> Chosen:
        """The next choice that is meant for whoever asks. Raises `DeadlineError`."""
        found = self._records.await_record("chosen", self._chosen(replica), Chosen, meant, deadline)
        if found is None:
            raise DeadlineError(f"a choice of replica {replica}", deadline.seconds, ["its member of rank 0"])
        return found

    def _wants(self, replica: str, rank: int) -> str:
        return f"{self._records.root}/wants/{quote(replica, safe='')}/{rank}"

    def _chosen(self, replica: str) -> str:
        return f"{self._records.root}/chosen/{quote(replica, safe='')}"


def fleet_of(job: str, holder: str, place: int = 0) -> str:
    """The job of the fleet in which a holder serves one of its copies."""
    return f"{job}/from/{quote(holder, safe='')}{f'+{place}' if place else ''}"


def tensors_of(layouts: Iterable[Layout]) -> str:
    """What all members together want or hold, whatever their shares: 32 hexadecimal digits, equal for equal tensors.

    Versions have equal digests only among those that want the same tensors, of the same dtypes.
    """
    found = {(tensor.name, tuple(tensor.shape), str(tensor.dtype)) for layout in layouts for tensor in layout.tensors}
    return hashlib.sha256(msgspec.msgpack.encode(sorted(found))).hexdigest()[:_TENSORS_DIGITS]


def nearest(host: str, domain: str) -> Prefer:
    """Whoever is on this host, else in this fabric domain, else has the fewest readers; replicas before the trainer."""

    def prefer(holders: Sequence[Holder]) -> Holder:
        return min(holders, key=lambda h: (h.host != host, h.domain != domain, h.original, h.readers, h.name))

    return prefer


def _sorted(
    candidates: Sequence[Holder], faults: Faults, others: Sequence[Holder]
) -> tuple[list[Holder], dict[str, str]]:
    """Those without faults; and what is wrong with the rest, in words, by name."""
    wrong = {each.name: [*faults(each), *_differing(each, others)] for each in candidates}
    able = [each for each in candidates if not wrong[each.name]]
    return able, {each.name: f"{_has(each)}{_but(wrong[each.name])}" for each in candidates if wrong[each.name]}


def _differing(holder: Holder, others: Sequence[Holder]) -> list[str]:
    """Equal versions are equal weights. The trainer is believed; among others, nobody."""
    return [
        f"its digest is {holder.digest}, but that of {other.name} is {other.digest}"
        for other in others
        if (other.version, other.tensors) == (holder.version, holder.tensors)
        and holder.digest and other.digest and other.digest != holder.digest
        and (other.original or not holder.original)
    ]  # fmt: skip


def _has(holder: Holder) -> str:
    versions = ", ".join(str(each.version) for each in holder.versions())
    return f"{holder.name} has {versions or 'none yet'}"


def _but(faults: Sequence[str]) -> str:
    more = f" and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
    return f", which does not fit: {'; '.join(faults[:_SHOWN_FAULTS])}{more}" if faults else ""
