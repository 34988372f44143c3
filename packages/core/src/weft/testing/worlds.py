"""A refit as one value: the machines of `weft.protocol`, the notices between them, and everything that may happen next.

A notice is delivered (those of one sender in order), bytes arrive, a member does its part, fails, dies, or loses
patience. `weft.testing.explorer` visits every world that can be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from weft.protocol import replica, source, sources, target
from weft.protocol.events import Actions, Do, Event, Tell, heard
from weft.wire import Notice

_TO_SOURCES = ("source-offered", "source-failed", "replica-begun", "replica-outcome")
_TO_SOURCE = ("go", "outcome")
_TO_REPLICA = (*replica.REPORTS, "failed", "withdraw")
_TO_TARGET = ("pause", "prepare", "commit", "installed", "abort")
OVER = (target.Stage.OFFERED, target.Stage.INSTALLED, target.Stage.ABORTED)
"""Stages in which a target waits for nothing."""

State = sources.Sources | source.Source | replica.Replica | target.Target
Slot = tuple[str, str]
"""(member, role): where a machine is. Roles: `sources`, `source`, `replica`, `target`, `relay`."""


@dataclass(frozen=True, slots=True)
class Job:
    """Who takes part. Leaders are the first of each list."""

    sources: tuple[str, ...] = ("trainer",)
    replicas: tuple[tuple[str, ...], ...] = (("first", "second"),)
    shadow: bool = False
    chained: bool = False
    """Whether sources send to the first replica alone, and each member of one passes on to all of the next."""
    faults: int = 1
    """How many members may fail or die, and how many deadlines may pass although something would still happen."""

    def after(self, name: str) -> tuple[str, ...]:
        """The members that pass on to this replica."""
        names = [members[0] for members in self.replicas]
        return self.replicas[names.index(name) - 1] if self.chained and name != names[0] else ()

    def before(self, member: str) -> tuple[str, ...]:
        """The replica that this member passes on to, if any."""
        return tuple(members[0] for members in self.replicas if member in self.after(members[0]))


@dataclass(frozen=True, slots=True)
class World:
    """One state of everything. Hashable."""

    machines: tuple[tuple[Slot, State], ...]
    channels: tuple[tuple[tuple[str, str], tuple[Notice, ...]], ...] = ()
    """(sender, receiver) → notices on their way, in order; those without any are left out."""
    called: frozenset[str] = frozenset()
    """Targets that have been asked to begin, and sources that hold their weights."""
    dead: frozenset[str] = frozenset()
    known: frozenset[tuple[str, str]] = frozenset()
    """(member, dead member that it knows of)."""
    weights: tuple[tuple[str, str], ...] = ()
    """Per target: `old`, `mixed` or `new`."""
    faults: int = 0

    def state(self, slot: Slot) -> State:
        """The machine in a place."""
        return dict(self.machines)[slot]


def first_world(job: Job) -> World:
    """Before anything has happened."""
    machines: list[tuple[Slot, State]] = []
    leader = job.sources[0]
    names = [members[0] for members in job.replicas]
    receiving = (sources.Receiving(name, name, job.after(name), frozenset(job.after(name)[:1])) for name in names)
    machines.append(((leader, "sources"), sources.Sources(job.sources, tuple(receiving))))
    for member in job.sources:
        machines.append(((member, "source"), source.Source(leader, tuple(map(source.Serving, names)))))
    for members in job.replicas:
        first = members[0]
        machines.append(((first, "replica"), replica.Replica(first, members, leader, job.shadow)))
        machines += [((member, "target"), target.Target(first, first, job.shadow)) for member in members]
        machines += [
            ((member, "relay"), source.Source(leader, tuple(map(source.Serving, job.before(member))), relay=True))
            for member in members
            if job.before(member)
        ]
    weights = tuple((member, "old") for members in job.replicas for member in members)
    return World(tuple(machines), weights=weights, faults=job.faults)


def next_worlds(job: Job, world: World) -> Iterator[tuple[str, World]]:
    """What may happen: everything that does by itself, faults as long as there are some left, and deadlines when
    nothing else is left to happen.
    """
    usual = [*_deliveries(world), *_doings(job, world), *_losses(job, world)]
    yield from usual
    if world.faults:
        fewer = replace(world, faults=world.faults - 1)
        yield from _deaths(fewer)
        yield from _failures(fewer)
        yield from _deadlines(fewer)
    if not usual:
        yield from _deadlines(world)


def _deliveries(world: World) -> Iterator[tuple[str, World]]:
    for (sender, receiver), notices in world.channels:
        rest = {**dict(world.channels), (sender, receiver): notices[1:]}
        taken = replace(world, channels=tuple(sorted((pair, left) for pair, left in rest.items() if left)))
        yield f"{receiver} hears {notices[0].kind} from {sender}", _hear(taken, sender, receiver, notices[0])


def _hear(world: World, sender: str, receiver: str, notice: Notice) -> World:
    event = heard(sender, notice)
    if notice.kind in ("offer", "begin"):
        return _call(world, receiver, notice)
    roles = {role for (member, role), _ in world.machines if member == receiver}
    relaying = "relay" if "relay" in roles else "source"
    for role, kinds in (("sources", _TO_SOURCES), (relaying, _TO_SOURCE), ("target", _TO_TARGET)):
        if notice.kind in kinds:
            return _feed(world, (receiver, role), event)
    assert notice.kind in _TO_REPLICA, notice
    return _conclude(_feed(world, (receiver, "replica"), event), receiver)


def _call(world: World, member: str, notice: Notice) -> World:
    """As `Refit.begin` does: the leader of a replica passes an offer on."""
    state = dict(world.machines).get((member, "replica"))
    if notice.kind == "offer" and isinstance(state, replica.Replica):
        if state.ended:
            return world
        others = (peer for peer in state.members if peer != member)
        world = _act(world, member, tuple(Tell(peer, Notice("begin", state.name)) for peer in others))
    return replace(world, called=world.called | {member})


def _doings(job: Job, world: World) -> Iterator[tuple[str, World]]:
    for (member, role), state in world.machines:
        if member in world.dead:
            continue
        if isinstance(state, source.Source):
            if not state.relay and member not in world.called:
                held = replace(world, called=world.called | {member})
                yield f"{member} holds its weights", _feed(held, (member, role), Event("held"))
            for known in state.replicas:
                if known.stage is source.Stage.SENDING and not known.ended and _may_send(job, world, member, state):
                    event = Event("sent", replica=known.replica)
                    yield f"{member} has sent to {known.replica}", _feed(world, (member, role), event)
        elif isinstance(state, target.Target) and (kind := _ready(job, world, member, state)):
            event = Event(kind, numbers=(1, 0) if kind == "arrived" else ())
            yield f"{member} has {kind}", _feed(world, (member, role), event)


def _ready(job: Job, world: World, member: str, state: target.Target) -> str | None:
    """What a target may do by itself now."""
    match state.stage:
        case target.Stage.OFFERED:
            return "ready" if member in world.called else None
        case target.Stage.BEGUN:
            return "arrived" if _has_all(job, world, member) and _has_passed_on(world, member) else None
        case target.Stage.VOTED:
            return "paused"
        case target.Stage.CLEARED:
            return "prepared"
        case target.Stage.DECIDED:
            return "committed"
    return None


def _has_all(job: Job, world: World, member: str) -> bool:
    name = next(members[0] for members in job.replicas if member in members)
    return all(_has_sent(world, each, name) for each in (*job.sources, *job.after(name)))


def _may_send(job: Job, world: World, member: str, state: source.Source) -> bool:
    return not state.relay or _has_all(job, world, member)


def _has_passed_on(world: World, member: str) -> bool:
    state = dict(world.machines).get((member, "relay"))
    return state is None or (isinstance(state, source.Source) and state.released)


def _has_sent(world: World, member: str, name: str) -> bool:
    machines = dict(world.machines)
    state = machines.get((member, "source")) or machines[member, "relay"]
    assert isinstance(state, source.Source)
    return any(known.replica == name and known.stage is source.Stage.SENT for known in state.replicas)


def _losses(job: Job, world: World) -> Iterator[tuple[str, World]]:
    for dead in sorted(world.dead):
        for member in sorted({slot[0] for slot, _ in world.machines} - world.dead):
            known = replace(
                world, known=world.known | {(member, dead)},
                channels=tuple(entry for entry in world.channels if entry[0] != (dead, member)),
            )  # fmt: skip
            then = _mind(job, known, member, dead)
            if then != world:
                yield f"{member} misses {dead}", then


def _mind(job: Job, world: World, member: str, dead: str) -> World:
    """What a member does about a loss that it knows of, as far as it needs the dead one now."""
    text = f"lost {dead}"
    for slot, state in world.machines:
        if slot[0] != member:
            continue
        if isinstance(state, sources.Sources) and dead in state.needed():
            world = _feed(world, slot, Event("lost", dead, text=text))
        elif isinstance(state, replica.Replica) and dead in state.needed():
            world = _conclude(_feed(world, slot, Event("lost", dead, text=text)), member)
        elif isinstance(state, target.Target) and state.stage not in OVER:
            missing = state.stage is target.Stage.BEGUN and dead in (*job.sources, *job.after(state.replica))
            if dead == state.leader or (missing and not _has_sent(world, dead, state.replica)):
                world = _feed(world, slot, Event("error", text=text))
        elif isinstance(state, source.Source) and not state.done:
            world = _miss(job, world, slot, state, dead)
    return world


def _miss(job: Job, world: World, slot: Slot, state: source.Source, dead: str) -> World:
    for known in state.replicas:
        members = next(members for members in job.replicas if members[0] == known.replica)
        if dead in members and known.stage is source.Stage.SENDING:
            world = _feed(world, slot, Event("error", replica=known.replica, text=f"lost {dead}"))
    if dead != state.leader:
        return world
    if state.relay:  # the target of this member sees to its relay
        return _feed(world, (slot[0], "target"), Event("error", text=f"lost {dead}"))
    return _give_up(world, slot[0])


def _deaths(world: World) -> Iterator[tuple[str, World]]:
    for member in sorted({slot[0] for slot, _ in world.machines} - world.dead):
        unheard = tuple(entry for entry in world.channels if entry[0][1] != member)
        yield f"{member} dies", replace(world, dead=world.dead | {member}, channels=unheard)


def _failures(world: World) -> Iterator[tuple[str, World]]:
    for (member, role), state in world.machines:
        if member in world.dead:
            continue
        if isinstance(state, target.Target) and (state.stage not in OVER or member in world.called):
            yield f"{member} fails", _feed(world, (member, role), Event("error", text="failed"))
        elif isinstance(state, source.Source):
            for known in state.replicas:  # of a relay, too, when it has waited long enough
                event = Event("error", replica=known.replica, text="failed")
                yield f"{member} fails to send to {known.replica}", _feed(world, (member, role), event)


def _deadlines(world: World) -> Iterator[tuple[str, World]]:
    """Deadlines that may pass: each would, if nothing happened any more."""
    for (member, role), state in world.machines:
        slot = (member, role)
        if member in world.dead:
            continue
        if isinstance(state, sources.Sources):
            for known in state.replicas:
                if known.stage is not sources.Stage.ENDED:
                    event = Event("late", replica=known.replica, text="in time")
                    yield f"{member} is tired of waiting for {known.replica}", _feed(world, slot, event)
        elif isinstance(state, source.Source) and not state.done and not state.relay:
            yield f"{member} is tired of waiting", _give_up(world, member)
        elif isinstance(state, target.Target) and state.stage not in OVER:
            yield f"{member} is tired of waiting", _feed(world, slot, Event("error", text="late"))


def _give_up(world: World, member: str) -> World:
    for slot, _ in world.machines:
        if slot[0] == member and slot[1] in ("source", "sources"):
            world = _feed(world, slot, Event("give-up", text="gave up"))
    return world


_STEPS: dict[str, Callable[..., tuple[State, Actions]]] = {
    "sources": sources.step, "source": source.step, "replica": replica.step, "target": target.step,
    "relay": source.step,
}  # fmt: skip


def _feed(world: World, slot: Slot, event: Event) -> World:
    before = world.state(slot)
    state, actions = _STEPS[slot[1]](before, event)
    machines = tuple((place, state if place == slot else other) for place, other in world.machines)
    world = _act(replace(world, machines=machines), slot[0], actions)
    if not isinstance(state, target.Target):
        return world
    relay = (slot[0], "relay")
    if state.stage is target.Stage.ABORTED and before != state and relay in dict(machines):
        world = _feed(world, relay, Event("give-up", text="aborted"))
    return _weigh(world, slot[0], state)


def _conclude(world: World, member: str) -> World:
    return _feed(world, (member, "replica"), Event("conclude"))


def _act(world: World, member: str, actions: Iterable[Tell | Do]) -> World:
    channels = dict(world.channels)
    weights = dict(world.weights)
    for action in actions:
        if isinstance(action, Tell):
            pair = (member, action.to)
            if action.to not in world.dead:
                channels[pair] = (*channels.get(pair, ()), _wordless(action.notice))
        elif action.what == "send":  # the first byte is on its way, into whatever is written
            for (name, role), state in world.machines:
                begun = isinstance(state, target.Target) and state.replica == action.about and not state.shadow
                if role == "target" and begun and weights[name] == "old":
                    weights[name] = "mixed"
    return replace(world, channels=tuple(sorted(channels.items())), weights=tuple(weights.items()))


def _wordless(notice: Notice) -> Notice:
    """Reasons are for people: without them, worlds that differ in words only are one."""
    return Notice(notice.kind, notice.replica, "reason" if notice.text else "", notice.numbers)


def _weigh(world: World, member: str, state: target.Target) -> World:
    weights = dict(world.weights)
    if state.stage is target.Stage.CLEARED and state.shadow:
        weights[member] = "mixed"
    elif state.stage is (target.Stage.PREPARED if state.shadow else target.Stage.VERIFIED):
        weights[member] = "new"
    return replace(world, weights=tuple(weights.items()))
