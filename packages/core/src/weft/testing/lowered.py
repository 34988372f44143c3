"""Buckets of several members side by side: a slice numbers members and tensors for itself, here all count alike."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from weft.copies import Copies
from weft.lower import LoweredBucket, MemberProgram, lower
from weft.plan import Plan
from weft.slices import Slice, slice_of
from weft.table import Int64s

_AXES = {"sizes": 1, "source_strides": 0, "target_strides": 0, "logical_strides": 0}
"""Columns with a width, and what pads them on the left."""


def lowered(plan: Plan, name: str) -> MemberProgram:
    """`lower` for one member; members, tensors and axes of all copies are those of `plan.copies`."""
    own = slice_of(plan, name)
    program = lower(own)

    def bucket(one: LoweredBucket) -> LoweredBucket:
        return replace(one, copies=_in_plan(plan, own, one.copies))

    return replace(
        program, local=_in_plan(plan, own, program.local), sends=tuple(map(bucket, program.sends)),
        receives=tuple(map(bucket, program.receives)),
    )  # fmt: skip


def _in_plan(plan: Plan, own: Slice, copies: Copies) -> Copies:
    numbers = {tensor.name: n for n, tensor in enumerate(plan.tensors)}
    tensor = np.array([numbers[each.name] for each in own.tensors], dtype=np.int64)
    member = np.array(own.numbers, dtype=np.int64)
    width = plan.loops.sizes.shape[1]
    columns: dict[str, Int64s] = {field.name: getattr(copies, field.name) for field in fields(Copies)}
    for name, pad in _AXES.items():
        columns[name] = np.pad(columns[name], ((0, 0), (width - columns[name].shape[1], 0)), constant_values=pad)
    columns |= {
        "source": member[copies.source], "target": member[copies.target], "tensor": tensor[copies.tensor]
    }  # fmt: skip
    return Copies(**columns)
