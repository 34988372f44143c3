"""A verification, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console

from weft.verification import State, TensorVerdict, Verification

_MOST_BOXES = 4
"""Differing boxes of one tensor that are spelled out; `--json` has them all."""
_MOST_NAMES = 6
"""Names that are listed for one reason of leaving out."""


def print_verification(console: Console, found: Verification, failures: Sequence[str], *, every: bool) -> None:
    """Every tensor that is not equal, those of one reason together, with `every` also those that are; then padding,
    what was left out, the sum.
    """
    for line in _lines(found, failures, every=every):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(found: Verification, failures: Sequence[str], *, every: bool) -> Iterator[str]:
    grouped: dict[tuple[str, str], list[str]] = {}
    for each in found.tensors:
        if each.state is State.DIFFERENT or (every and each.state is State.EQUAL):
            yield f"{each.state.value:18} {each.name}  {each.reason or each.digest}"
            yield from (f"{'':18} {line}" for line in _places(each))
        elif each.state is not State.EQUAL:
            grouped.setdefault((each.state.value, each.reason), []).append(each.name)
    for (state, reason), names in grouped.items():
        yield f"{state:18} {', '.join(names)}: {reason}"
    yield from (f"{'padding':18} {fault}" for fault in found.padding)
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.left_out:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        yield f"{'left out':18} {', '.join(names[:_MOST_NAMES])}{more}: {reason}"
    counts = Counter(each.state.value for each in found.tensors)
    yield f"{'tensors':18} {', '.join(f'{count:,} {state}' for state, count in sorted(counts.items())) or 'none'}"
    yield f"{'bytes':18} {found.bytes:,} compared"
    yield f"{'digest':18} {found.digest or 'none, because not everything is equal'}"
    if failures:
        yield f"{'FAILED':18} {len(failures)} faults" if found.bytes else f"{'FAILED':18} no byte was compared"
    else:
        equal = set(counts) == {State.EQUAL.value}
        yield f"{'passed':18} {'every tensor is equal' if equal else 'what could be compared is equal'}"


def _places(each: TensorVerdict) -> Iterator[str]:
    """Where a tensor differs, and the first values."""
    for where in each.differences[:_MOST_BOXES]:
        difference = where.difference
        yield (
            f"{where.rank}, {difference.buffer}, {difference.box}: {difference.differing_elements:,} of "
            f"{difference.elements:,} elements, {difference.differing_bytes:,} bytes"
        )
        for one in difference.examples:
            yield f"  {list(one.index)} expected {one.expected}, found {one.found}"
    if len(each.differences) > _MOST_BOXES:
        yield f"and {len(each.differences) - _MOST_BOXES} more boxes"
