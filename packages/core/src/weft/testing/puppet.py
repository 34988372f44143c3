"""Members on strings: a transport endpoint in another process (or thread) that does what a test says, call by call."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import torch

from weft.contracts import SEGMENT, Bucket, Message, Prepared, Registration, TransferProgram, Transport, Work
from weft.deadline import Deadline
from weft.errors import DeadlineError, PeerLostError, WeftError
from weft.member import Member, Region, RemoteRegion, Tag

POISON = 0xA5
"""What every byte of a new region holds, so that a byte that never arrived shows."""
EPOCH = 3
"""Memory epoch in every tag that a puppet sends."""
_END_SECONDS = 10.0
_CENSUS_BYTES = 16 << 20


class Reply(msgspec.Struct, array_like=True):
    """A command's result, or the `WeftError` that it raised."""

    value: Any = None
    kind: str = ""
    text: str = ""
    peer: str = ""


class PuppetError(Exception):
    """A command raised a `WeftError` over there: `kind` is its class name, `peer` the lost one of a `PeerLostError`."""

    def __init__(self, reply: Reply) -> None:
        self.kind, self.text, self.peer = reply.kind, reply.text, reply.peer
        super().__init__(f"{reply.kind}: {reply.text}")


class Gate:
    """An event that is reached when the test says so."""

    def __init__(self) -> None:
        self.open = False

    def query(self) -> bool:
        """Whether it was opened."""
        return self.open

    def synchronize(self) -> None:
        """Never needed: transports ask."""
        raise AssertionError("a transport must not block on an event")


@dataclass
class Actor:
    """The far end of a puppet: one method per command."""

    factory: Callable[[Mapping[str, Any]], Transport]
    options: Mapping[str, Any]
    transport: Transport | None = None
    member: Member | None = None
    registrations: list[Registration] = field(default_factory=list)
    prepared: dict[bytes, Prepared] = field(default_factory=dict)
    works: dict[int, Work] = field(default_factory=dict)
    gate: Gate = field(default_factory=Gate)
    messages: list[Message] = field(default_factory=list)
    """Arrived, not yet collected."""

    @property
    def endpoint(self) -> Transport:
        """The transport."""
        assert self.transport is not None, "open first"
        return self.transport

    def make(self, extra: Mapping[str, Any]) -> None:
        """Make a transport with additional options and close it again."""
        self.factory({**self.options, **extra}).close()

    def most_segments(self) -> int:
        """How many segments a bucket may have here."""
        return self.endpoint.capabilities.max_segments

    def open(self, name: str, incarnation: int, sizes: Sequence[int]) -> None:
        """A fresh endpoint with regions of these sizes, poisoned."""
        self.close()
        self.registrations, self.prepared, self.works, self.messages, self.gate = [], {}, {}, [], Gate()
        self.transport = self.factory(self.options)
        self.member = Member(name, "source", "target", None, 0, "here", "here", "cpu", incarnation=incarnation)
        self.transport.open(self.member)
        for nbytes in sizes:
            self.register(nbytes)

    def record(self) -> tuple[bytes, bytes, list[tuple[int, int, str]]]:
        """Member, address and regions, as peers need them."""
        regions = [(r.region.address, r.region.nbytes, str(r.region.device)) for r in self.registrations]
        return msgspec.msgpack.encode(self.member), self.endpoint.address(), regions

    def register(self, nbytes: int) -> None:
        """One more region."""
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        region = Region(f"region{len(self.registrations)}", memory)
        self.registrations.append(self.endpoint.register(region, Deadline.after(_END_SECONDS)))

    def register_zeros(self, nbytes: int) -> None:
        """One more region, of zeros, which takes up no memory until it is written."""
        region = Region(f"region{len(self.registrations)}", torch.from_numpy(np.zeros(nbytes, np.uint8)))
        self.registrations.append(self.endpoint.register(region, Deadline.after(_END_SECONDS)))

    def register_part(self, region: int, start: int, stop: int, step: int) -> None:
        """Register a part of memory that is registered already, on top."""
        memory = self.registrations[region].region.memory[start:stop:step]
        self.endpoint.register(Region("part", memory), Deadline.after(_END_SECONDS))

    def deregister(self, region: int) -> None:
        """Take a region back, twice, since it must be idempotent; it keeps its place in the list."""
        self.endpoint.deregister(self.registrations[region])
        self.endpoint.deregister(self.registrations[region])

    def register_again(self, region: int) -> None:
        """Register memory that was deregistered."""
        again = self.registrations[region].region
        self.registrations[region] = self.endpoint.register(again, Deadline.after(_END_SECONDS))

    def connect(self, member: bytes, address: bytes, seconds: float) -> None:
        """Reach a peer."""
        peer = msgspec.msgpack.decode(member, type=Member)
        self.endpoint.connect(peer, address, Deadline.after(seconds))

    def disconnect(self, peer: str) -> None:
        """Forget a peer, twice."""
        self.endpoint.disconnect(peer)
        self.endpoint.disconnect(peer)

    def prepare(
        self,
        key: bytes,
        sends: Sequence[tuple[int, str, bytes]],
        receives: Sequence[tuple[int, str, bytes]],
        remote: Mapping[str, Sequence[tuple[int, int, str]]],
        seconds: float,
    ) -> None:
        """Prepare a program whose buckets are (index, peer, bytes of a SEGMENT array)."""
        program = TransferProgram(
            key,
            tuple(Bucket(index, peer, np.frombuffer(rows, SEGMENT)) for index, peer, rows in sends),
            tuple(Bucket(index, peer, np.frombuffer(rows, SEGMENT)) for index, peer, rows in receives),
            tuple(registration.region for registration in self.registrations),
            {peer: tuple(RemoteRegion(*region) for region in regions) for peer, regions in remote.items()},
        )
        self.prepared[key] = self.endpoint.prepare(program, Deadline.after(seconds))

    def release(self, key: bytes) -> None:
        """Undo a preparation, twice."""
        self.endpoint.release(self.prepared[key])
        self.endpoint.release(self.prepared[key])

    def fill(self, seed: int) -> None:
        """Random bytes in every region."""
        random = np.random.default_rng(seed)
        for registration in self.registrations:
            memory = registration.region.memory
            memory.numpy()[:] = random.integers(0, 256, memory.numel(), dtype=np.uint8)

    def poison(self) -> None:
        """Make every byte of every region wrong again."""
        for registration in self.registrations:
            registration.region.memory.fill_(POISON)

    def contents(self, region: int) -> bytes:
        """Bytes of a region."""
        return self.registrations[region].region.memory.numpy().tobytes()

    def put(self, region: int, at: int, data: bytes) -> None:
        """Write these bytes into a region."""
        self.registrations[region].region.memory.numpy()[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def read(self, region: int, at: int, nbytes: int) -> bytes:
        """Some bytes of a region."""
        return self.registrations[region].region.memory[at : at + nbytes].numpy().tobytes()

    def census(self, region: int) -> dict[int, int]:
        """How many bytes of a region have each value, without those that none has."""
        counts = np.zeros(256, np.int64)
        for part in self.registrations[region].region.memory.split(_CENSUS_BYTES):
            low, high = (int(end) for end in part.aminmax())
            if low == high:  # nearly always, and much faster
                counts[low] += part.numel()
            else:
                counts += np.bincount(part.numpy(), minlength=256)
        return {value: int(count) for value, count in enumerate(counts) if count}

    def post(self, key: bytes, bucket: int, version: int, note: bytes, gated: bool) -> None:
        """Post a bucket; when gated, only `open_gate` lets it start."""
        after = self.gate if gated else None
        self.works[bucket] = self.endpoint.post(self.prepared[key], bucket, self._tag(version), note, after)

    def open_gate(self) -> None:
        """Let gated posts start."""
        self.gate.open = True

    def posted(self, bucket: int, peer: str, seconds: float) -> None:
        """Wait until a post has finished. Like a refit, it drives both `Work.poll` and `Transport.poll`."""
        work = self.works[bucket]

        def finished() -> bool:
            self._drain()
            return work.poll()

        Deadline.after(seconds).wait(finished, f"post of bucket {bucket}", lambda: [peer])

    def cancel(self, bucket: int) -> None:
        """Give a post up, twice."""
        self.works[bucket].cancel()
        self.works[bucket].cancel()

    def signal(self, peer: str, version: int, note: bytes) -> None:
        """Send a signal."""
        self.endpoint.signal(peer, self._tag(version), note)

    def collect(self, count: int, seconds: float) -> list[tuple[str, tuple[int, str, int, int], int | None, bytes]]:
        """Poll until that many messages have arrived, and give them: (peer, fields of the tag, bucket, note)."""

        def enough() -> bool:
            self._drain()
            return len(self.messages) >= count

        Deadline.after(seconds).wait(enough, f"{count} messages", lambda: [f"{count - len(self.messages)} of them"])
        taken, self.messages = self.messages[:count], self.messages[count:]
        return [(m.peer, msgspec.structs.astuple(m.tag), m.bucket, m.note) for m in taken]

    def collect_and_read(self, key: bytes, bucket: int, version: int, region: int, seconds: float) -> bytes:
        """Poll until a message has arrived, fence, and give a region's bytes as they are at that moment."""
        self.collect(1, seconds)
        self.fence(key, bucket, version)
        return self.contents(region)

    def lost(self, count: int, seconds: float) -> list[str]:
        """Poll until that many peers were reported lost or the time is over; who they were."""
        names: list[str] = []

        def enough() -> bool:
            try:
                self._drain()
            except PeerLostError as error:
                names.append(error.peer)
            return len(names) >= count

        with contextlib.suppress(DeadlineError):
            Deadline.after(seconds).wait(enough, f"{count} losses", lambda: names)
        return names

    def fence(self, key: bytes, bucket: int, version: int) -> None:
        """Make arrived bytes visible."""
        self.endpoint.fence(self.prepared[key], bucket, self._tag(version), None)

    def close(self) -> None:
        """Close, twice."""
        if self.transport is not None:
            self.transport.close()
            self.transport.close()

    def _drain(self) -> None:
        self.messages.extend(self.endpoint.poll())

    def _tag(self, version: int) -> Tag:
        assert self.member is not None, "open first"
        return Tag(version, self.member.name, self.member.incarnation, EPOCH)


def perform(connection: Connection, factory: str, options: Mapping[str, Any]) -> None:
    """Obey commands until the test hangs up. `factory` is `module:name`."""
    module, _, name = factory.partition(":")
    torch.set_num_threads(1)
    if multiprocessing.parent_process() is not None:
        faulthandler.enable()
    actor = Actor(getattr(importlib.import_module(module), name), options)
    with connection:
        while True:
            try:
                command, arguments = msgspec.msgpack.decode(connection.recv_bytes())
            except EOFError:
                break
            try:
                reply = Reply(getattr(actor, command)(*arguments))
            except WeftError as error:
                reply = Reply(None, type(error).__name__, str(error), getattr(error, "peer", ""))
            connection.send_bytes(msgspec.msgpack.encode(reply))
    actor.close()


class Puppet:
    """The near end. `in_process` makes it a thread, whose death is nothing but a close.

    A command that has not ended after `answer_seconds` is an `AssertionError`.
    """

    def __init__(self, factory: str, options: Mapping[str, Any], in_process: bool, answer_seconds: float) -> None:
        self._answer_seconds = answer_seconds
        context = multiprocessing.get_context("spawn")
        self._near, far = context.Pipe()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._thread: threading.Thread | None = None
        if in_process:
            self._thread = threading.Thread(target=perform, args=(far, factory, options), daemon=True)
            self._thread.start()
        else:
            self._process = context.Process(target=perform, args=(far, factory, options), daemon=True)
            self._process.start()
            far.close()
        self.alive = True

    def begin(self, command: str, *arguments: Any) -> None:
        """Send a command; `end` fetches its result."""
        try:
            self._near.send_bytes(msgspec.msgpack.encode((command, arguments)))
        except BrokenPipeError as error:
            raise self._death(command) from error

    def end(self) -> Any:
        """The result of the command begun last. Raises `PuppetError` for an error of weft."""
        if not self._near.poll(self._answer_seconds):
            self.alive = False
            if self._process is not None:
                self._process.kill()
            raise AssertionError(f"a member has not answered within {self._answer_seconds} s: it blocks")
        try:
            reply = msgspec.msgpack.decode(self._near.recv_bytes(), type=Reply)
        except EOFError as error:
            raise self._death("its last command") from error
        if reply.kind:
            raise PuppetError(reply)
        return reply.value

    def call(self, command: str, *arguments: Any) -> Any:
        """Command and result."""
        self.begin(command, *arguments)
        return self.end()

    def kill(self) -> None:
        """SIGKILL; a thread closes its transport instead, which is all that peers can see of a death in one process."""
        if self._process is None:
            self.call("close")
        else:
            self._process.kill()
            self._process.join(_END_SECONDS)
            self._near.close()
        self.alive = False

    def freeze(self) -> None:
        """SIGSTOP; a thread simply gets no commands."""
        self._send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._send_signal(signal.SIGCONT)

    def end_all(self) -> None:
        """Hang up and wait for it to end; kill it when it does not."""
        self._near.close()
        if self._process is not None:
            self._process.join(_END_SECONDS)
            if self._process.is_alive():
                self._process.kill()
                self._process.join(_END_SECONDS)
            self._process.close()
        elif self._thread is not None and self.alive:
            self._thread.join(_END_SECONDS)

    def _death(self, command: str) -> AssertionError:
        """What to raise for a puppet that died by itself; the crew replaces it."""
        self.alive = False
        code = None
        if self._process is not None:
            self._process.join(_END_SECONDS)
            code = self._process.exitcode
        return AssertionError(f"a member died at {command} (exit code {code}); its stderr says more")

    def _send_signal(self, number: int) -> None:
        if self._process is not None and self._process.pid is not None:
            os.kill(self._process.pid, number)
