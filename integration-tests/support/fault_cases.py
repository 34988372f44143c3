"""The rows of the fault matrix: who may be struck, when, and by what."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from enum import StrEnum

from support.engine_company import ENGINE, WORKER, EngineCompany
from support.fleet import SOURCES, STRUCK, Company

from weft.protocol.events import Step

MEMBERS = (f"{STRUCK}/0", f"{STRUCK}/1")
"""Of the cheap replica."""
TRANSPORTS = ("nixl", "gloo")
LANDINGS = ("in_place", "shadow")
LIMITS = 3.0
"""Seconds of every deadline but the rendezvous."""
ENGINE_LIMITS = 6.0
"""The same where an engine shares the machine with them."""


class Role(StrEnum):
    """Whom a fault strikes."""

    SOURCE_LEADER = "sources' leader"
    SOURCE = "source"
    REPLICA_LEADER = "replica's leader"
    MEMBER = "member"
    STORE = "store"
    WORKER = "engine's worker"
    """Of vLLM: it has the weights, and is the only member of its replica."""
    ENGINE = "engine"
    """All processes of a vLLM engine."""


class Fault(StrEnum):
    """What strikes."""

    KILL = "kill"
    """SIGKILL; it is started again once the version has ended for the others."""
    FREEZE = "freeze"
    """SIGSTOP, until the version has ended for the others."""
    CUT = "cut"
    """All its TCP connections end, at once; new ones can be made."""
    CORRUPT = "corrupt"
    """One bit of what arrives there next, a bucket or a notice, is another one."""
    DELAY = "delay"
    """SIGSTOP for a time that is shorter than every deadline."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who is in a fleet whose struck replica is of one kind."""

    company: type[Company]
    members: tuple[str, ...]
    """Processes of the replica that say what they serve."""
    processes: Mapping[Role, str]
    stops: Mapping[Step, str]
    """Who stops at a step, before it says that it is done, so that the fault comes then."""
    limits: float = LIMITS
    at_once: int = len(TRANSPORTS) * len(LANDINGS)
    """Fleets that run at the same time."""
    dying: Mapping[str, str] = field(default_factory=dict)
    """Processes that take one of `members` along when they are killed."""

    def lost(self, name: str) -> str:
        """Who has to be started again when this process is killed."""
        return self.dying.get(name, name)


MEMORY, VLLM = "memory", "vllm"
"""Kinds of the replica that is struck: of two cheap members, and an engine of one worker."""
CASTS = {
    MEMORY: Cast(
        Company, MEMBERS,
        {Role.SOURCE_LEADER: SOURCES[0], Role.SOURCE: SOURCES[1], Role.REPLICA_LEADER: MEMBERS[0],
         Role.MEMBER: MEMBERS[1], Role.STORE: "store"},
        {Step.OFFER: SOURCES[1], Step.BEGIN: MEMBERS[1], Step.MOVE: SOURCES[1], Step.VERIFY: MEMBERS[1],
         Step.VOTE: MEMBERS[0], Step.PREPARE_COMMIT: MEMBERS[1], Step.COMMIT: MEMBERS[1], Step.RESUME: MEMBERS[0]},
    ),
    VLLM: Cast(
        EngineCompany, (ENGINE,),
        {Role.SOURCE: SOURCES[1], Role.WORKER: WORKER, Role.ENGINE: ENGINE, Role.STORE: "store"},
        {**dict.fromkeys(Step, WORKER), Step.OFFER: SOURCES[1], Step.MOVE: SOURCES[1]},
        ENGINE_LIMITS, 1, {WORKER: ENGINE},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """What is done in one row."""

    step: Step
    role: Role
    fault: Fault
    transport: str
    landing: str
    engine: str = MEMORY

    @property
    def key(self) -> str:
        """All of it."""
        return "/".join(astuple(self))

    @property
    def excluded(self) -> str:
        """Why there is nothing to do, if so."""
        if self.role is Role.STORE and self.fault is Fault.CORRUPT:
            return "no byte of a version passes through the store"
        return ""


def product() -> list[Case]:
    """Every case of cheap targets."""
    roles = CASTS[MEMORY].processes
    return [Case(*each) for each in itertools.product(Step, roles, Fault, TRANSPORTS, LANDINGS)]


STRIKES = (
    (Role.SOURCE, Fault.KILL), (Role.SOURCE, Fault.FREEZE), (Role.WORKER, Fault.CUT), (Role.ENGINE, Fault.FREEZE),
    (Role.WORKER, Fault.KILL), (Role.WORKER, Fault.CORRUPT), (Role.STORE, Fault.KILL),
)  # fmt: skip
"""What a vLLM engine goes through over gloo; over NIXL the first four of them, in place."""


def engine_product() -> list[Case]:
    """Every case of an engine."""
    over = [(Step, STRIKES, [("gloo", "in_place"), ("gloo", "shadow")]), (Step, STRIKES[:4], [("nixl", "in_place")])]
    cases = (each for factors in over for each in itertools.product(*factors))
    return [Case(step, *strike, *kind, VLLM) for step, strike, kind in cases]


def pairwise() -> list[Case]:
    """Cases among which every two values that occur together somewhere do so, by always taking one with most pairs."""
    left = {case: _pairs(case) for case in product() if not case.excluded}
    wanted, chosen = set().union(*left.values()), []
    while wanted:
        ranked = sorted(left, key=lambda case: _groups(chosen).count((case.transport, case.landing)))
        chosen.append(max(ranked, key=lambda case: len(left[case] & wanted)))
        wanted -= left.pop(chosen[-1])
    return sorted(chosen, key=product().index)


def _groups(cases: Sequence[Case]) -> list[tuple[str, str]]:
    return [(case.transport, case.landing) for case in cases]


def _pairs(case: Case) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    return set(itertools.combinations(enumerate(astuple(case)), 2))


def groups(cases: Sequence[Case]) -> list[list[Case]]:
    """By engine, transport and landing: those that can share a fleet."""
    held: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        held.setdefault((case.engine, case.transport, case.landing), []).append(case)
    return list(held.values())
