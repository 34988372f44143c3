"""Damaged messages: valid ones with bits, bytes, lengths or pieces of others changed, or values within the message."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect as schema

Random = random.Random


@dataclass(frozen=True, slots=True)
class Reader:
    """Something that decodes."""

    name: str
    samples: Sequence[bytes]
    """Valid inputs."""
    read: Callable[[bytes], object]
    covers: tuple[str, ...] = ()
    """Functions in which it decodes by other means than a schema."""
    wrap: Callable[[bytes], bytes] = bytes
    """Checksums, codes and compression around the msgpack that the samples are."""
    msgpack: bool = True
    share: float = 1.0
    """Of the inputs that the others get; less for what is slow."""


def example(kind: schema.Type, random: Random, depth: int = 0) -> Any:
    """A value of a type, as msgpack has it."""
    more = depth + 1
    match kind:
        case schema.StructType(cls=cls, array_like=True):
            tag = [kind.tag] if kind.tag is not None else []
            return [*tag, *(example(field.type, random, more) for field in kind.fields)] if cls else []
        case schema.StructType():
            return {field.encode_name: example(field.type, random, more) for field in kind.fields}
        case schema.Metadata(type=inner):
            return example(inner, random, depth)
        case schema.UnionType(types=types):
            return example(random.choice(types), random, depth)
        case schema.VarTupleType(item_type=item) | schema.ListType(item_type=item):
            return [example(item, random, more) for _ in range(random.choice((1, 1, 2, 3)))]
        case schema.TupleType(item_types=items):
            return [example(item, random, more) for item in items]
        case schema.DictType(key_type=key, value_type=value):
            return {example(key, random, more): example(value, random, more) for _ in range(2)}
        case schema.EnumType(cls=cls):
            return random.choice(list(cls)).value
        case schema.LiteralType(values=values):
            return random.choice(values)
        case schema.StrType():
            return random.choice(("", "a", "trainer/0", "cpu", "float32"))
        case schema.BytesType():
            return random.choice((b"", bytes(8), b"\x04" + bytes(8), b"\x93\x01\x02\x03"))
        case schema.BoolType():
            return random.random() < 0.5
        case schema.FloatType():
            return random.random()
        case schema.IntType():
            return random.choice((1, 2, 3, 64))
        case schema.NoneType():
            return None
    return random.choice((None, 1, "a", [1]))


EXTREMES = (0, 1, -1, 127, 2**31, 2**32, -(2**31), 2**53, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
HEADS = (
    b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\x7f\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\x91" * 600,
)
"""Beginnings of arrays, bytes, texts and maps of 4 GiB; nesting."""


def damaged(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Bytes with some changes."""
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(raw) + 1)
        match random.randrange(9):
            case 0 | 1 if at < len(raw):
                raw[at] ^= 1 << random.randrange(8)
            case 2 if at < len(raw):
                raw[at] = random.choice((0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xFF, random.randrange(256)))
            case 3:
                del raw[at:]
            case 4:
                del raw[at : at + random.randrange(1, 16)]
            case 5:
                raw[at:at] = random.randbytes(random.randrange(1, 16))
            case 6:
                raw[at : at + random.choice((0, 1, 5))] = random.choice(HEADS)
            case 7:
                other = random.choice(others)
                start = random.randrange(len(other) + 1)
                raw[at : at + random.randrange(64)] = other[start : start + random.randrange(64)]
            case 8:
                raw[at:at] = raw[at : at + random.randrange(1, 64)] * random.choice((1, 1, 50))
    return bytes(raw)


def replaced(value: Any, random: Random) -> Any:
    """A decoded message with one of its values changed, whatever lies in it."""
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        match random.randrange(10):
            case 0:
                return value[:at]
            case 1:
                return value[:at] + value[at + 1 :]
            case 2:
                return [*value, value[at]]
        return [*value[:at], replaced(value[at], random), *value[at + 1 :]]
    if isinstance(value, dict) and value and random.random() < 0.8:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: replaced(value[key], random)}
    if isinstance(value, bytes) and random.random() < 0.7:
        if len(value) >= 8 and random.random() < 0.5:
            at = random.randrange(len(value) // 8) * 8 + len(value) % 8
            number = random.choice(EXTREMES) % 2**64
            return value[:at] + number.to_bytes(8, "little") + value[at + 8 :]
        return damaged(value, [value], random)
    if isinstance(value, int) and random.random() < 0.7:
        return max(-(2**63), min(random.choice((*EXTREMES, value + 1, value - 1, -value)), 2**64 - 1))
    return random.choice((None, True, 0, 1, -1, 2**63, 1.5, float("nan"), float("inf"), "", "é" * 9, b"", [], {}, [[]]))


def inputs(reader: Reader, count: int, seed: int) -> Iterator[bytes]:
    """Damaged inputs, the same for the same seed."""
    random = Random(f"{reader.name} {seed}")
    values = [msgspec.msgpack.decode(sample) for sample in reader.samples] if reader.msgpack else []
    for _ in range(count):
        within = random.random()
        if values and within < 0.5:
            value = random.choice(values)
            for _ in range(random.choice((1, 1, 2, 5))):
                value = replaced(value, random)
            yield reader.wrap(msgspec.msgpack.encode(value))
        elif within < 0.75:
            yield reader.wrap(damaged(random.choice(reader.samples), reader.samples, random))
        else:
            yield damaged(reader.wrap(random.choice(reader.samples)), reader.samples, random)
