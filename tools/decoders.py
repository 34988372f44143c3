"""Every decoder of core and of the transports, for `fuzz.py`.

What is decoded by schema alone is found in the sources: every type that `decoded`, `decoder_of` or `JobStore.find` is
called with. What does more is in `readers`; `unread` names functions that decode by other means and are in neither.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from msgspec import inspect as schema

from distributions import PACKAGES
from mutations import Random, Reader, example
from weft import load_config
from weft.authentication import Guard, Secret
from weft.contracts import Message, Transport
from weft.control import _hello, _Wire
from weft.endpoint import decode
from weft.errors import WeftError
from weft.job_store import JobStore
from weft.layout import Layout
from weft.local import LocalHub
from weft.local import factory as local_factory
from weft.member import Member, Tag
from weft.plan import plan
from weft.planfile import load_plan, save_plan
from weft.policy import Policy
from weft.records import MAGIC, decoded, seal
from weft.roster import Event, Roster
from weft.slices import Slice, prove, slice_of
from weft.testing.tiny import Tiny
from weft.wire import Wire
from weft_gloo.parcels import HEAD_BYTES, read_head

GOLDEN = PACKAGES / "core" / "tests" / "golden"
_SOURCES = ("core", "transports/*")
_BY_SCHEMA = {"decoded": 0, "decoder_of": 0, "find": 2, "opened": 2, "await_record": 2, "_read": 2}
"""Calls whose argument of this number is a schema."""
_BY_HAND = {"unpack", "unpack_from", "frombuffer", "loads", "from_bytes", "decompress", "memmap", "decode"}
WHOLE = {"weft.planfile._Header", "weft.slices._SliceRecord"}
"""Schemas that are too narrow for an example; there is a reader of what they are part of."""
NOT_DECODERS = {
    "weft.digest.tensor_seed": "reads a hash",
    "weft.records.decoded": "what is fuzzed, by every schema",
    "weft_gloo.parcels.announcement": "makes what is sent",
    "weft_nccl.library": "words of the library",
    "weft_nixl.diagnosis": "words of the library",
    "weft_mapped": "memory of the own process",
    "weft.store_file": "its own files",
    "weft.replay.Receiver._take": "words of an error",
    "weft.store_wire.length_in": "a length, with its bound",
}
"""Functions, or modules, that call one of these for something else, and what."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of core and the transports, parsed, but those for tests."""
    for pattern in _SOURCES:
        for file in sorted(PACKAGES.glob(f"{pattern}/src/**/*.py")):
            parts = file.relative_to(next(p for p in file.parents if p.name == "src")).with_suffix("").parts
            if "testing" not in parts:
                yield ".".join(part for part in parts if part != "__init__"), ast.parse(file.read_text())


def calls(tree: ast.AST, inside: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the function or class that it is in."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if isinstance(node, ast.Call):
            yield inside, node
        yield from calls(node, f"{inside}.{node.name}" if named else inside)  # type: ignore[attr-defined]


def _kinds() -> dict[str, Any]:
    """What records are read as, by kind."""
    found = {}
    for name, tree in modules():
        for _, call in calls(tree, name):
            match call:
                case ast.Call(args=[ast.Constant(value=str(kind)), _, ast.Name(id=word)]) if _called(call) == "find":
                    found[kind] = getattr(importlib.import_module(name), word, None) or getattr(builtins, word)
    return found


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def schemas() -> Iterator[tuple[str, Any]]:
    """Every type that bytes are decoded as, by the module and its name there."""
    for name, tree in modules():
        for _, call in calls(tree, name):
            place = _BY_SCHEMA.get(_called(call))
            kind = call.args[place] if place is not None and place < len(call.args) else None
            if isinstance(kind, ast.Name) and (kind.id[0].isupper() or kind.id.startswith("_")):
                yield f"{name}.{kind.id}", getattr(importlib.import_module(name), kind.id)


def unread(known_readers: Sequence[Reader]) -> list[str]:
    """Functions that decode by other means than a schema, and that none of these readers covers."""
    covered = [*NOT_DECODERS, *(function for reader in known_readers for function in reader.covers)]
    found = {inside for name, tree in modules() for inside, call in calls(tree, name) if _called(call) in _BY_HAND}
    return sorted(each for each in found if not any(f"{each}.".startswith(f"{known}.") for known in covered))


def readers(folder: Path) -> list[Reader]:
    """Everything that decodes; `folder` is for files."""
    random = Random(0)
    found: dict[Any, Reader] = {}
    golden = _payloads()
    for name, kind in schemas():
        if name in WHOLE:
            continue
        made = [msgspec.msgpack.encode(example(schema.type_info(kind), random)) for _ in range(40)]
        valid = [data for data in (*made, *(one for of in golden.values() for one in of)) if _valid(kind, data)]
        found[kind] = Reader(f"schema {name}", valid, lambda data, kind=kind: decoded(kind, data, "not one"))
    return [*found.values(), *_of_records(), *_of_plans(folder), *_of_messages(), *_of_configurations(folder)]


def _valid(kind: Any, data: bytes) -> bool:
    try:
        decoded(kind, data, "")
    except WeftError:
        return False
    return True


def _golden() -> dict[str, dict[str, Any]]:
    """Valid payloads of now by name."""
    found: dict[str, dict[str, Any]] = json.loads(max(GOLDEN.glob("*.json"), key=lambda file: file.stem).read_text())
    return found


def _payloads() -> dict[str, list[bytes]]:
    """What is in records, by their kinds."""
    newest = _golden()
    payloads: dict[str, list[bytes]] = {}
    for name, entry in newest.items():
        kind, of_record, _ = name.partition(" record ")
        if of_record and "secret" not in name:
            envelope = msgspec.msgpack.decode(bytes.fromhex(entry["bytes"])[len(MAGIC) :])
            payloads.setdefault(kind, []).append(envelope[3])
    return payloads


def _of_records() -> Iterator[Reader]:
    """Records of all kinds, with and without a secret, and what members conclude from those of the rendezvous."""
    payloads = _payloads()
    types = dict.fromkeys(payloads, Any) | _kinds()  # some are for people to look at: nothing reads them
    hub: Any = SimpleNamespace(get=lambda key: None, set=lambda key, value: None)
    for secret in (None, Secret("a secret for fuzzing records")):
        store = JobStore(hub, "job", secret)
        key = store.key.derived(b"record") if store.key else None
        for kind, samples in payloads.items():

            def wrap(data: bytes, kind: str = kind, key: Any = key) -> bytes:
                return seal(kind, msgspec.Raw(data), place="p", key=key)

            def read(data: bytes, kind: str = kind, store: JobStore = store) -> None:
                record = store.opened(kind, "p", types[kind], data)
                if isinstance(record, Event):
                    _concluded(record)

            words = " with a secret" if secret else ""
            covers = ("weft.rendezvous.EndpointRecord", "weft.prepare._columns", "weft.roster._readable")
            yield Reader(f"record {kind}{words}", samples, read, covers, wrap)


def _concluded(event: Event) -> None:
    """What a roster makes of an event between others."""
    roster = Roster()
    for each in (event, msgspec.structs.replace(event, name="a"), event):
        roster.apply(each)
        attempt = roster.attempt(each.name, each.incarnation)
        if attempt is not None:
            attempt.failure()


def _of_plans(folder: Path) -> Iterator[Reader]:
    """Layouts, slices with their proof, plan files."""
    tiny = Tiny(layers=1, hidden=4, inner=6)
    held, wanted = [tiny.source(n, 2) for n in range(2)], [tiny.target(n, 2, scratch_slots=2) for n in range(2)]
    sources = [Member(f"s{n}", each.address, None, None, 0, "h", "h", "cpu") for n, each in enumerate(held)]
    targets = [Member(f"t{n}", None, each.address, "r", 2, "h", "h", "cpu") for n, each in enumerate(wanted)]
    whole = plan(sources, targets, {each.address: each for each in (*held, *wanted)}, Policy())
    slices = [zlib.decompress(slice_of(whole, f"t{n}").encoded) for n in range(2)]
    layouts = [each.encoded for each in (*held, *wanted)]

    def read_layout(data: bytes) -> None:
        found = Layout.decode(data)
        assert found.nbytes >= 0
        list(found)

    def read_slice(data: bytes) -> None:
        found = Slice.decode(data)
        prove(found, None, wanted[0])

    contents = ("weft.rendezvous.Rendezvous.layout", "weft.publication.holders.Directory.layouts")
    yield Reader("layout", layouts, read_layout, ("weft.layout.PieceTable", *contents))
    covers = ("weft.slices._unpack", "weft.slices.Slice.decode", "weft.connection._slice")
    yield Reader("slice and its proof", slices[:1], read_slice, covers, lambda data: zlib.compress(data, 1))
    file = folder / "fuzzed.plan"
    save_plan(whole, file)
    saved = file.read_bytes()

    def read_plan(data: bytes) -> None:
        file.unlink(missing_ok=True)
        file.write_bytes(data)
        load_plan(file)

    def checked(data: bytes) -> bytes:
        """A plan file whose header is this, with the right checksum."""
        body = saved[-(-(20 + int.from_bytes(saved[12:16], "little")) // 64) * 64 :]
        head = saved[:12] + len(data).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little") + data
        return head + bytes(-len(head) % 64) + body

    header = saved[20 : 20 + int.from_bytes(saved[12:16], "little")]
    yield Reader("plan file", [header], read_plan, ("weft.planfile",), checked)


def _of_messages() -> Iterator[Reader]:
    """What comes from peers and from strangers on their ports."""
    newest = _golden()
    golden = {name: bytes.fromhex(entry["bytes"]) for name, entry in newest.items()}
    envelopes = [golden["envelope of a bucket"], golden["envelope of a signal"]]
    yield Reader("envelope", envelopes, lambda data: decode(data, "peer"), ("weft.endpoint.decode", "weft_nixl"))

    def framed(data: bytes) -> bytes:
        return len(data).to_bytes(4, "little") + data

    def read_frames(data: bytes) -> None:
        wire = _Wire(SimpleNamespace(), True)  # type: ignore[arg-type]
        for at in range(0, len(data), 50):
            wire.heard += data[at : at + 50]
            for body in wire.frames():
                _hello(body)

    frames = ("weft.control._Wire.frames",)
    yield Reader("control connection", [golden["hello"]], read_frames, frames, framed)
    yield Reader(
        "head of gloo", envelopes, _gloo_head, ("weft_gloo.parcels.read_head", "weft_gloo.link.Link._envelope"), framed
    )
    hub = LocalHub()
    people = [Member(name, None, None, None, 0, "h", "h", "cpu", incarnation=2, memory_epoch=1) for name in "ab"]
    ends: list[Transport] = [local_factory({"hub": hub}) for _ in people]
    for end, person in zip(ends, people, strict=True):
        end.open(person)
    key = Secret("a secret for fuzzing messages").key("job")
    tag = Tag(1, "a", 2, 1)
    for guarded in (False, True):
        says, hears = (Guard(key, "a"), Guard(key, "b")) if guarded else (None, None)
        if says is not None and hears is not None:
            says.admit("b", hears.nonce)
            hears.admit("a", says.nonce)

        def sign(data: bytes, says: Guard | None = says) -> bytes:
            return data if says is None else says.signal("b", tag, data)

        wire = Wire(ends[1], people[1], people, hears)

        def read_signal(data: bytes, wire: Wire = wire) -> None:
            wire._sort(Message("a", tag, None, data))
            wire.take(1, "replica-outcome")

        words = " with a secret" * guarded
        notices = [golden["notice"]]
        yield Reader(f"signal{words}", notices, read_signal, ("weft.authentication",), sign)


def _gloo_head(data: bytes) -> None:
    """Reads a link's head, and the envelope when the rest of it is there."""
    head = torch.frombuffer(bytearray(data[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0")), dtype=torch.uint8)
    body, missing = read_head(head, "peer")
    decode(body + data[HEAD_BYTES : HEAD_BYTES + missing], "peer")


def _of_configurations(folder: Path) -> Iterator[Reader]:
    """Files and variables."""
    file = folder / "fuzzed.toml"
    text = (
        'job = "j"\nstore = "tcp://h:1"\nname = "n"\nreplica_size = 2\n[expect]\nsources = 8\nreplicas = 2\n'
        "[transport]\n"
        'name = "gloo"\ndepth = 2\n[policy]\nonly = ["a"]\ncasts = [["float32", "bfloat16"]]\nrelay = "host"\n'
        "digests = false\nbucket_bytes = 8192\n[deadlines]\nmove = 1.5\n"
    )

    def read_file(data: bytes) -> None:
        file.write_bytes(data)
        load_config(file=file, environment={})

    def read_variables(data: bytes) -> None:
        lines = (line.partition("=") for line in data.decode(errors="surrogateescape").split("\n"))
        load_config(environment={name: value for name, _, value in lines})

    variables = (
        'WEFT_TRANSPORT=gloo\nWEFT_POLICY_CASTS=[["float32","bfloat16"]]\nWEFT_POLICY_ONLY=a,b\nWEFT_GLOO_DEPTH=2\n'
        "WEFT_DEADLINES_MOVE=2\nWEFT_SECRET=sixteen bytes and more\nWEFT_POLICY_DIGESTS=true\nWEFT_EXPECT_SOURCES=1\n"
        "WEFT_EXPECT_REPLICAS=1"
    )
    yield Reader("configuration file", [text.encode()], read_file, ("weft.config",), msgpack=False, share=0.1)
    yield Reader("variables", [variables.encode()], read_variables, ("weft.options._parsed",), msgpack=False, share=0.1)
