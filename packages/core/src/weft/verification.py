"""The verdict on an engine or a model: what all of its ranks hold together, against a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import msgspec

from weft.box import Box, common_factors, cuts_of, refine, row_major
from weft.compare import ComparedTensor, Difference, Part, RankComparison, Reference
from weft.digest import Digest
from weft.policy import Policy
from weft.table import subtract


class State(StrEnum):
    """What became of one tensor."""

    EQUAL = "equal"
    """Every element is held by some rank, and every rank's bits are the checkpoint's."""
    DIFFERENT = "different"
    UNEQUAL_KIND = "unequal kind"
    """Another shape, or another dtype without a declared cast."""
    NOT_IN_CHECKPOINT = "not in checkpoint"
    NOT_LOADED = "not loaded"
    """The checkpoint has it, and no rank holds any of it."""
    LOADED_IN_PART = "loaded in part"
    """Some elements are held by no rank."""
    NOT_COMPARED = "not compared"
    """Some rank's memory could not be read; what could be read is equal."""


class RankDifference(msgspec.Struct, frozen=True):
    """A box that differs, and on which rank."""

    rank: str
    difference: Difference


class TensorVerdict(msgspec.Struct, frozen=True):
    """One tensor over all ranks."""

    name: str
    state: State
    ranks: tuple[str, ...] = ()
    """Those that hold some of it."""
    digest: str = ""
    """Of the whole tensor as the ranks hold it, each element counted once; empty unless every element was read and
    boxes of different ranks are equal or disjoint."""
    reason: str = ""
    """In words, for every state but `equal`."""
    differences: tuple[RankDifference, ...] = ()


class Verification(msgspec.Struct, frozen=True):
    """The outcome of `weft verify`."""

    tensors: tuple[TensorVerdict, ...]
    """Every tensor of either side, by name."""
    padding: tuple[str, ...]
    """Padding that does not hold its value, by rank and buffer."""
    left_out: tuple[tuple[str, str], ...]
    """(name, reason) of local tensors that no checkpoint holds."""
    bytes: int
    """Compared, over all ranks."""
    digest: str
    """Of the whole version, as a refit reports it; empty unless every tensor is equal."""

    def failures(self, *, partial: bool = False) -> list[str]:
        """Everything that is wrong, in words; `partial` accepts tensors that could not be compared. Nothing compared
        at all is a failure in any case.
        """
        accepted = {State.EQUAL, State.NOT_COMPARED} if partial else {State.EQUAL}
        found = [f"{each.name}: {each.reason}" for each in self.tensors if each.state not in accepted]
        found += self.padding
        return found if self.bytes else [*found, "no byte was compared"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What `weft verify` asks of an adapter."""

    model: str
    """Directory that the engine or model is loaded from."""
    checkpoint: str
    """Directory or file that it is compared with."""
    parallel: dict[str, int] = {}
    """Parallel sizes, by the framework's own flag names."""
    dtype: str = ""
    """Of the engine; empty leaves it to the framework."""
    casts: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    """Patterns of the checkpoint's tensors that need not be loaded."""
    options: dict[str, Any] = {}
    """Further arguments for the framework."""

    @property
    def policy(self) -> Policy:
        """Casts and exceptions as declared."""
        return Policy(casts=self.casts, ignore=self.ignore)


@runtime_checkable
class Verifier(Protocol):
    """What an entry point of group `weft.adapters` may offer beside `weft.contracts.Adapter`, for `weft verify`."""

    def verify(self, request: Request, report: Callable[[str], None]) -> Verification:
        """Load what `request` names, compare every rank, and let go of it. `report` is told what is going on.

        Raises `ConfigError` for what the framework or the checkpoint does not have.
        """
        ...


def verdict(ranks: Mapping[str, RankComparison], reference: Reference, policy: Policy) -> Verification:
    """Put the comparisons of all ranks together, by rank name. Pure."""
    held: dict[str, dict[str, ComparedTensor]] = {}
    for rank, comparison in ranks.items():
        for tensor in comparison.tensors:
            held.setdefault(tensor.name, {})[rank] = tensor
    verdicts = [_over_ranks(name, found, reference) for name, found in held.items()]
    claimed = {tensor.reference for found in held.values() for tensor in found.values()}
    verdicts += [
        TensorVerdict(name, State.NOT_LOADED, reason="the checkpoint has it, and no rank holds any of it")
        for name in reference.tensors.keys() - claimed
        if reference.tensors[name].numel() and not policy.ignores(name)
    ]
    verdicts.sort(key=lambda each: each.name)
    left_out = dict(entry for comparison in ranks.values() for entry in comparison.left_out)
    complete = all(each.state is State.EQUAL and each.digest for each in verdicts)
    once = {tensor.reference: name for name, found in held.items() for tensor in found.values()}
    digests = [Digest.from_hex(each.digest) for each in verdicts if complete and each.name in once.values()]
    return Verification(
        tuple(verdicts),
        tuple(f"{rank}: {fault}" for rank, comparison in ranks.items() for fault in comparison.padding),
        tuple(sorted(left_out.items())),
        sum(tensor.bytes for found in held.values() for tensor in found.values()),
        sum(digests, Digest()).hex() if digests else "",
    )


def _over_ranks(name: str, found: Mapping[str, ComparedTensor], reference: Reference) -> TensorVerdict:
    holders = tuple(rank for rank, tensor in found.items() if tensor.parts or tensor.unread_parts or tensor.fault)
    faults: dict[str, list[str]] = {}
    for rank, tensor in found.items():
        if tensor.fault:
            faults.setdefault(tensor.fault, []).append(rank)
    if faults:
        absent = any(not tensor.reference for tensor in found.values())
        state = State.NOT_IN_CHECKPOINT if absent else State.UNEQUAL_KIND
        reason = "; ".join(f"{', '.join(where)}: {fault}" for fault, where in faults.items())
        return TensorVerdict(name, state, holders, reason=reason)
    differences = tuple(RankDifference(rank, each) for rank, tensor in found.items() for each in tensor.differences)
    shape = tuple(reference.tensors[next(iter(found.values())).reference].shape)
    read = {_box(part): part.digest for tensor in found.values() for part in tensor.parts}
    unread = {_box(part) for tensor in found.values() for part in tensor.unread_parts}
    missing = _missing(shape, read.keys() | unread)
    if differences:
        elements = sum(each.difference.differing_elements for each in differences)
        where = ", ".join(sorted({each.rank for each in differences}))
        return TensorVerdict(
            name, State.DIFFERENT, holders, reason=f"{elements} elements differ on {where}", differences=differences
        )
    if missing:
        return TensorVerdict(name, State.LOADED_IN_PART, holders, reason=f"{missing} elements are held by no rank")
    reasons = dict.fromkeys(tensor.unread for tensor in found.values() if tensor.unread)
    if reasons:
        return TensorVerdict(name, State.NOT_COMPARED, holders, reason="; ".join(reasons))
    once = sum(box.numel for box in read) == math.prod(shape)
    digest = sum((Digest.from_hex(each) for each in read.values()), Digest()).hex() if once else ""
    return TensorVerdict(name, State.EQUAL, holders, digest)


def _box(part: Part) -> Box:
    return Box(part.factors, part.lo, part.hi)


def _missing(shape: tuple[int, ...], boxes: Set[Box]) -> int:
    """How many elements of a tensor no box covers."""
    factors = common_factors(shape, {cut for box in boxes for cut in cuts_of(box.factors)})
    left = [((0,) * len(factors), factors)] if 0 not in shape else []
    for box in boxes:
        for each, _, _ in refine(box, 0, row_major(box.sizes), factors):
            left = subtract(left, each.lo, each.hi)
    return sum(Box(factors, lo, hi).numel for lo, hi in left)
