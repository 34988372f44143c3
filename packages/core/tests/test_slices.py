"""A member proves its slice of a plan against its own layouts, and refuses every other."""

from __future__ import annotations

from dataclasses import fields, replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.copies import Parts, Routes
from weft.errors import PlanError, RecordError
from weft.layout import Layout
from weft.plan import plan
from weft.slices import Slice, prove, slice_of
from weft.testing.models import Case, random_case

seeds = st.integers(0, 2**32 - 1)


def slices(case: Case) -> list[tuple[Slice, Layout | None, Layout | None]]:
    """Every member's slice, with its own layouts."""
    planned = plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts)
    layouts = {None: None, **case.layouts}
    return [
        (slice_of(planned, m.name), layouts[m.source_layout], layouts[m.target_layout]) for m in planned.members
    ]  # fmt: skip


@given(seeds)
@settings(max_examples=80, deadline=None)
@pytest.mark.trap(1, 3)
def test_every_member_proves_its_slice_and_it_survives_the_wire(seed: int) -> None:
    for own, source, target in slices(random_case(Random(seed))):
        prove(own, source, target)
        again = Slice.decode(own.encoded)
        assert again.encoded == own.encoded
        assert again.address == own.address
        prove(again, source, target)


def damaged(own: Slice, random: Random) -> Slice | None:
    """The slice with one copy dropped, doubled, or moved in one column; None where that leaves it as it was."""
    me = [member.name for member in own.members].index(own.name)
    routes = own.routes
    mine = np.flatnonzero(routes.target == me)
    if not len(mine):
        return None
    victim = int(random.choice(mine.tolist()))
    how = random.choice(("drop", "double", "source_offset", "target_offset", "target_buffer", "range", "strides"))
    if how in ("drop", "double"):
        rows = np.arange(len(routes))
        rows = np.delete(rows, victim) if how == "drop" else np.append(rows, victim)
        return replace(own, routes=Routes(*(getattr(routes, f.name)[rows] for f in fields(Routes))))
    part = int(routes.part[victim])
    columns = {f.name: getattr(own.parts, f.name).copy() for f in fields(Parts)}
    if how == "range":
        axis = random.randrange(columns["lo"].shape[1]) if columns["lo"].shape[1] else -1
        if axis < 0 or columns["hi"][part, axis] - columns["lo"][part, axis] < 2:
            return None
        columns["hi"][part, axis] -= 1
    elif how == "strides":
        sizes = columns["hi"][part] - columns["lo"][part]
        if not (sizes > 1).any():
            return None
        columns["target_strides"][part, int(np.flatnonzero(sizes > 1)[0])] += 1
    elif how == "source_offset":
        if routes.source[victim] != me:
            return None  # another member's memory: that one refuses
        columns[how][part] += 1
    else:
        columns[how][part] += 1
    return replace(own, parts=Parts(**columns))


@given(seeds)
@settings(max_examples=250, deadline=None)
@pytest.mark.trap(1, 3, 42)
def test_a_slice_with_one_thing_wrong_is_refused(seed: int) -> None:
    random = Random(seed)
    own, source, target = random.choice(slices(random_case(random)))
    wrong = damaged(own, random)
    if wrong is not None:
        with pytest.raises(PlanError):
            prove(wrong, source, target)


@given(seeds, st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_records_are_refused_as_such(seed: int, data: st.DataObject) -> None:
    own = slices(random_case(Random(seed)))[0][0]
    raw = bytearray(own.encoded)
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        Slice.decode(bytes(raw))
    except RecordError:
        return


def test_a_slice_is_small_and_names_peers_only() -> None:
    case = random_case(Random(3))
    for own, _, _ in slices(case):
        me = [member.name for member in own.members].index(own.name)
        others = set(own.routes.source.tolist()) | set(own.routes.target.tolist()) | {me}
        assert others == set(range(len(own.members)))
        assert set(own.parts.tensor.tolist()) == set(range(len(own.tensors)))
