"""Relays: targets that pass on what they received, so that a box comes once to every host or fabric domain, or once
from all sources.

A relay is a copy whose sender is no source: it reads the sender's own target memory. Within a replica a box is passed
on once, by a member that has it from elsewhere. Between replicas it goes along a chain, always to a replica with a
later name; so nobody waits in a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weft.holders import DOMAIN, HOST, LEVELS, places
from weft.join import Overlaps
from weft.member import Member
from weft.table import Int64s, Ragged, ragged_classes, unique_rows

Truths = npt.NDArray[np.bool_]
_LEVEL = {"host": HOST, "domain": DOMAIN}
"""Within which level of locality (`weft.holders`) each policy passes boxes on."""


@dataclass(frozen=True, slots=True)
class Wants:
    """Copies in plan order: copy i brings row `box[i]` of `boxes` to member `target[i]`."""

    boxes: Overlaps
    box: Int64s
    target: Int64s
    level: Int64s
    """How far the nearest source of each copy is (`weft.holders`)."""
    tensor: Int64s
    """Of every row of `boxes`, as the next two."""
    group: Int64s
    live: Truths
    """Whether it lands in live memory."""
    nbytes: Int64s

    @property
    def identity(self) -> Int64s:
        """Number of every copy's box. In equal boxes the group is equal, too: nobody waits for a later group of a
        member that waits for it.
        """
        columns = [self.tensor[:, None], self.group[:, None], self.boxes.lo, self.boxes.hi]
        return unique_rows(np.concatenate(columns, axis=1))[1][self.box]

    def able(self, sources: Truths) -> Truths:
        """Copies that may be passed on: from live memory, by members that are no sources."""
        return self.live[self.box] & ~sources[self.target]


def passed_on_by(wants: Wants, members: Sequence[Member], within: str, chained: bool) -> Int64s:
    """For every copy that is relayed, the copy whose target passes it on; -1 for those that come from sources.

    `within` is `Policy.relay`, and `chained` whether replicas pass on to each other.
    """
    found = np.full(len(wants.target), -1, dtype=np.int64)
    names = sorted({m.replica or m.name for m in members})
    numbers = {name: n for n, name in enumerate(names)}
    replica = np.array([numbers[m.replica or m.name] for m in members], dtype=np.int64)
    if within != "never":
        _pass_within(found, wants, members, replica, _LEVEL[within])
    if chained:
        _pass_between(found, wants, members, replica)
    return found


def _pass_within(found: Int64s, wants: Wants, members: Sequence[Member], replica: Int64s, level: int) -> None:
    """Copies of one box to one replica on one host (or in one domain) where no source is are a ring: one of them comes
    from elsewhere, and the rest from its target. Rings of the same members share the work by bytes.
    """
    count, target = len(members), wants.target
    _, place = unique_rows(np.stack([places(members)[level], replica], axis=1))
    far = np.flatnonzero(wants.level > level)
    key = wants.identity[far] * count + place[target[far]]
    _, ring, size = np.unique(key, return_inverse=True, return_counts=True)
    far, ring = far[size[ring] > 1], ring[size[ring] > 1]
    _, first = np.unique(ring * count + target[far], return_index=True)  # by ring, then by member
    row, ring_of = far[first], ring[first]
    able = wants.able(np.array([m.is_source for m in members]))[row]
    givers = Ragged.by_key(ring_of[able], row[able], len(size))
    some = np.flatnonzero(givers.sizes)
    if not len(some):
        return
    givers = Ragged(givers.starts[some], givers.sizes[some], givers.values)
    kind, _ = ragged_classes(Ragged(givers.starts, givers.sizes, target[givers.values]))
    nbytes_of = wants.nbytes[wants.box[givers.values[givers.starts]]]
    chosen = np.full(len(size), -1, dtype=np.int64)
    chosen[some] = givers.values[givers.starts + _turns(kind, nbytes_of, givers.sizes)]
    giver = chosen[ring]
    found[far] = np.where(target[giver] == target[far], -1, giver)


def _pass_between(found: Int64s, wants: Wants, members: Sequence[Member], replica: Int64s) -> None:
    """What would come from sources on other hosts comes from the replica before, of those that want the same box: of
    those on one's own host if there are any, else in one's own domain, else anywhere. Its members take turns.
    """
    codes, target = places(members), wants.target
    able = np.flatnonzero(wants.able(np.array([m.is_source for m in members])))
    need = np.flatnonzero((found < 0) & (wants.level > HOST))
    identity = wants.identity
    boxes = int(identity.max(initial=0)) + 1
    for level in (HOST, DOMAIN, LEVELS - 1):
        if not len(need) or not len(able):
            return
        place, width = codes[level], int(codes[level].max()) + 1
        ring = identity * width + place[target]
        after = ring * (int(replica.max()) + 1) + replica[target]
        order = able[np.lexsort((able, target[able], after[able]))]
        begins = np.searchsorted(after[order], after[need])  # behind those of earlier replicas in this ring
        last = order[np.maximum(begins - 1, 0)]
        has = (begins > 0) & (ring[last] == ring[need])
        first = np.searchsorted(after[order], after[last])
        count, turn = np.maximum(begins - first, 1), _rank(after[need], target[need])
        # Fewer than there are to give: others for other boxes, in runs of neighbours so that peers stay few.
        _, number, wanting = np.unique(after[need], return_inverse=True, return_counts=True)
        turn += np.where(wanting[number] < count, identity[need] * count // boxes, 0)
        found[need[has]] = order[(first + turn % count)[has]]
        need = need[~has]


def _rank(key: Int64s, member: Int64s) -> Int64s:
    """The place of every entry among those of its key, by member."""
    order = np.lexsort((member, key))
    rank = np.empty(len(key), dtype=np.int64)
    rank[order] = np.arange(len(key)) - np.searchsorted(key[order], key[order])
    return rank


def _turns(kind: Int64s, size: Int64s, count: Int64s) -> Int64s:
    """Who passes on each box of `size` bytes, from 0 to `count` - 1: those of a kind are laid end to end and divided
    evenly.
    """
    order = np.argsort(kind, kind="stable")
    end = np.cumsum(size[order])
    first = np.searchsorted(kind[order], kind[order])
    begin = (end - size[order])[first]
    last = np.searchsorted(kind[order], kind[order], side="right") - 1
    total = end[last] - begin
    turn = np.zeros(len(kind), dtype=np.int64)
    turn[order] = (2 * (end - begin) - size[order]) * count[order] // (2 * total)
    return turn
