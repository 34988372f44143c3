"""Plan files: a versioned header, then the columns as they lie in memory, so that a plan loads without being parsed.

Layout of a file (little-endian): 8 bytes magic `WEFTPLAN`, uint32 format version, uint32 header length, uint32 checksum
of the header (CRC-32, as in zip files), the header (msgpack), zeros up to a multiple of 64, then the splits and every
column of `Parts` and `Routes` in turn, each padded to a multiple of 64. The header holds the planner version, the
fingerprint, checksum and length of the body, and how many rows and factors there are.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from dataclasses import fields
from pathlib import Path

import msgspec
import numpy as np

from weft.copies import Parts, Routes
from weft.errors import PlanError, RecordError
from weft.member import Member
from weft.plan import PLANNER_VERSION, Plan, PlannedTensor
from weft.policy import Policy
from weft.records import decoded
from weft.table import Int64s

MAGIC = b"WEFTPLAN"
FORMAT_VERSION = 2
_PREFIX = struct.Struct("<8sIII")
_ALIGNMENT = 64
_WIDE = ("lo", "hi", "source_strides", "target_strides")
_PART_COLUMNS = tuple(field.name for field in fields(Parts))
_ROUTE_COLUMNS = tuple(field.name for field in fields(Routes))


class _Header(msgspec.Struct):
    """New fields get defaults, so that neighbouring versions can read each other's files."""

    planner: int
    fingerprint: str
    members: tuple[Member, ...]
    tensors: tuple[PlannedTensor, ...]
    aliases: tuple[tuple[str, str], ...]
    policy: Policy
    egress_bound: int
    parts: int
    routes: int
    width: int
    """Factors per split."""
    body_bytes: int
    body_checksum: int


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a file; what was there is replaced at once or not at all. Raises `OSError`."""
    columns = [plan.splits, plan.scratch_slots, *(getattr(plan.parts, name) for name in _PART_COLUMNS)]
    columns += [getattr(plan.routes, name) for name in _ROUTE_COLUMNS]
    blocks: list[bytes] = []
    for column in columns:
        data = np.ascontiguousarray(column, dtype="<i8").tobytes()
        blocks += [data, bytes(-len(data) % _ALIGNMENT)]
    body = b"".join(blocks)
    header = msgspec.msgpack.encode(
        _Header(
            PLANNER_VERSION, plan.fingerprint, plan.members, plan.tensors, plan.aliases, plan.policy, plan.egress_bound,
            len(plan.parts), len(plan.routes), plan.splits.shape[1], len(body), zlib.crc32(body),
        )
    )  # fmt: skip
    head = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(header), zlib.crc32(header)) + header
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(head + bytes(-len(head) % _ALIGNMENT) + body)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_plan(path: Path, *, fingerprint: str | None = None) -> Plan:
    """Map a plan file into memory.

    Raises `RecordError` for a file that is not a plan, is truncated, damaged or of another format version, `PlanError`
    when it was made by another planner or for other members, layouts or policy than `fingerprint` says, `OSError` when
    it cannot be read.
    """
    if path.stat().st_size < _PREFIX.size:
        raise RecordError(f"{path} has {path.stat().st_size} bytes: not a plan file, or truncated")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    magic, version, length, checksum = _PREFIX.unpack(data[: _PREFIX.size].tobytes())
    if magic != MAGIC:
        raise RecordError(f"{path} starts with {magic!r}, expected {MAGIC!r}: not a plan file")
    if version != FORMAT_VERSION:
        raise RecordError(f"{path} has format version {version}, this weft reads {FORMAT_VERSION}: plan again")
    start = -(-(_PREFIX.size + length) // _ALIGNMENT) * _ALIGNMENT
    raw = data[_PREFIX.size : _PREFIX.size + length].tobytes()
    if zlib.crc32(raw) != checksum:
        raise RecordError(f"{path}: the checksum of its header differs: truncated or damaged")
    header = decoded(_Header, raw, f"{path}: the header is damaged")
    body = data[start : start + header.body_bytes]
    if len(data) != start + header.body_bytes:
        raise RecordError(f"{path} has {len(data)} bytes, expected {start + header.body_bytes}: truncated or damaged")
    if zlib.crc32(body.data) != header.body_checksum:
        raise RecordError(f"{path}: the checksum of its columns differs: damaged")
    plan = _plan(path, header, body)
    if header.planner != PLANNER_VERSION:
        raise PlanError([f"{path} was made by planner {header.planner}, this weft has {PLANNER_VERSION}: plan again"])
    for expected in (header.fingerprint, fingerprint):
        if expected is not None and plan.fingerprint != expected:
            raise PlanError([f"{path} is of plan {plan.fingerprint[:16]}, expected {expected[:16]}: plan again"])
    return plan


def _plan(path: Path, header: _Header, body: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Plan:
    shapes: dict[str, tuple[int, ...]] = {
        "splits": (len(header.tensors), header.width),
        "slots": (len(header.members),),
    }
    shapes |= {name: (header.parts, header.width) if name in _WIDE else (header.parts,) for name in _PART_COLUMNS}
    shapes |= {f"routes.{name}": (header.routes,) for name in _ROUTE_COLUMNS}
    found: dict[str, Int64s] = {}
    at = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * 8
        if min(shape) < 0 or at + nbytes > len(body):
            raise RecordError(f"{path}: column {name} is missing or too short: damaged")
        found[name] = body[at : at + nbytes].view("<i8").reshape(shape)
        at += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    if at != len(body):
        raise RecordError(f"{path}: its columns take {at} bytes of {len(body)}: damaged")
    bounds = {
        "tensor": len(header.tensors), "routes.source": len(header.members), "routes.target": len(header.members),
        "routes.part": header.parts, "routes.counted": 2,
    }  # fmt: skip
    for name, limit in bounds.items():
        if len(found[name]) and not 0 <= found[name].min() <= found[name].max() < limit:
            raise RecordError(f"{path}: column {name} refers to what the header does not have: damaged")
    return Plan(
        header.members, header.tensors, header.aliases, header.policy, found["splits"],
        Parts(*(found[name] for name in _PART_COLUMNS)),
        Routes(*(found[f"routes.{name}"] for name in _ROUTE_COLUMNS)), found["slots"], header.egress_bound,
    )  # fmt: skip
