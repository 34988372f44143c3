"""Every order of events: the protocol's own machines, tried exhaustively on a small job.

`explore` visits every world (`weft.testing.worlds`) and says which of them break a promise of `docs/protocol.md`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from weft.protocol import replica, source, sources, target
from weft.testing.worlds import OVER, Job, World, first_world, next_worlds

_DECIDED = (target.Stage.DECIDED, target.Stage.COMMITTED, target.Stage.INSTALLED)
_CLEARED = (target.Stage.CLEARED, target.Stage.PREPARED, *_DECIDED)


@dataclass(slots=True)
class Explored:
    """What was found."""

    worlds: int = 0
    ends: set[tuple[str, ...]] = field(default_factory=set)
    """How refits ended: per replica `committed`, `aborted` or `lost`."""
    broken: list[tuple[str, list[str]]] = field(default_factory=list)
    """Broken promises, each with what led there."""


def explore(job: Job, most: int = 10) -> Explored:
    """Visit every world; stops after `most` broken promises."""
    first = first_world(job)
    before: dict[World, tuple[World, str] | None] = {first: None}
    queue, found = deque([first]), Explored()
    while queue and len(found.broken) < most:
        world = queue.popleft()
        found.worlds += 1
        following = list(next_worlds(job, world))
        faults = [*_unsafe(job, world), *([] if following else _unended(job, world))]
        found.broken += [(fault, _way(before, world)) for fault in faults]
        if not following:
            found.ends.add(tuple(_outcome(world, members) for members in job.replicas))
        for what, then in following:
            if then not in before:
                before[then] = (world, what)
                queue.append(then)
    return found


def _way(before: dict[World, tuple[World, str] | None], world: World) -> list[str]:
    steps = []
    while (last := before[world]) is not None:
        world, what = last
        steps.append(what)
    return steps[::-1]


def _unsafe(job: Job, world: World) -> Iterator[str]:
    """Promises about every moment."""
    weights = dict(world.weights)
    for members in job.replicas:
        alive = [member for member in members if member not in world.dead]
        stages = dict(zip(alive, _targets(world, alive), strict=True))
        for member, state in stages.items():
            served = _served(state)
            if served and any(weights[other] != served for other in alive):
                yield f"{member} serves {served} weights, but members hold {weights}"
            late = _unverified(world, members)
            if state.stage in _CLEARED and late:
                yield f"{member} is {state.stage}, but {', '.join(late)} has not verified"
            if state.stage in _DECIDED and any(weights[other] != "new" for other in alive):
                yield f"{member} is {state.stage}, but members hold {weights}"
        for each in job.sources:
            if _believes(world, each, members[0]) == "committed" and any(weights[other] != "new" for other in alive):
                yield f"{each} takes replica {members[0]} for committed, but members hold {weights}"


def _targets(world: World, members: Iterable[str]) -> list[target.Target]:
    states = (world.state((member, "target")) for member in members)
    return [state for state in states if isinstance(state, target.Target)]


def _unverified(world: World, members: tuple[str, ...]) -> tuple[str, ...]:
    """Members of whom their leader has not heard that every byte is there."""
    state = world.state((members[0], "replica"))
    assert isinstance(state, replica.Replica)
    return state.missing("verified")


def _believes(world: World, member: str, name: str) -> str:
    """How a source thinks that a replica has ended."""
    state = world.state((member, "source"))
    assert isinstance(state, source.Source)
    known = next(known for known in state.replicas if known.replica == name)
    return "open" if not known.ended else "committed" if known.reason is None else "aborted"


def _served(state: target.Target) -> str | None:
    """What a replica would serve whose control is at this member; None while it is paused or refuses."""
    if state.stage is target.Stage.INSTALLED:
        return "new"
    paused = state.stage in (target.Stage.PAUSED, target.Stage.CLEARED) or not state.shadow
    over = state.stage in (target.Stage.OFFERED, target.Stage.ABORTED)
    untouched = not state.touched and (over or not paused)
    return "old" if untouched else None


def _unended(job: Job, world: World) -> Iterator[str]:
    """Promises about the end: nobody waits without end, and without faults every replica has the version."""
    for (member, _), state in world.machines:
        if member in world.dead:
            continue
        over = isinstance(state, source.Source) and state.relay and state.released
        if isinstance(state, source.Source | sources.Sources) and not (state.done or over):
            yield f"{member} waits without end: {state}"
        if isinstance(state, target.Target) and state.stage not in OVER:
            yield f"{member} waits without end: {state}"
    if world.faults == job.faults:
        for members in job.replicas:
            heard_of = {_believes(world, member, members[0]) for member in job.sources}
            if {_outcome(world, members), *heard_of} != {"committed"}:
                yield f"replica {members[0]} has not committed, or not all sources know, though nothing has failed"


def _outcome(world: World, members: tuple[str, ...]) -> str:
    if any(member in world.dead for member in members):
        return "lost"
    installed = all(state.stage is target.Stage.INSTALLED for state in _targets(world, members))
    return "committed" if installed else "aborted"
