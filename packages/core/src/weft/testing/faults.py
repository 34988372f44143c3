"""The transport `faulty`: any other transport, with a test between it and the member that uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.contracts import (
    Bucket,
    Capabilities,
    Event,
    Message,
    Prepared,
    Registration,
    Stream,
    TransferProgram,
    Transport,
    Work,
)
from weft.deadline import Deadline
from weft.endpoint import Factory
from weft.member import Member, Region, Tag
from weft.plugins import load


class Script:
    """What a test does to one endpoint's traffic. Override what is needed; by default nothing is done."""

    def posting(self, bucket: Bucket, tag: Tag) -> None:
        """Before a bucket is posted; may raise."""

    def signalling(self, peer: str, tag: Tag, note: bytes) -> bool:
        """Before a signal is sent; whether to send it."""
        return True

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        """What a poll brought; returns what it is to bring instead."""
        return messages


def make(options: Mapping[str, Any]) -> FaultyTransport:
    """Options: `transport`, name of the real one; `transport_options`, its options; `script`, a `Script`."""
    inner: Transport = load("weft.transports", options["transport"])(options["transport_options"])
    return FaultyTransport(inner, options["script"])


def install(folder: Path) -> None:
    """Make `folder`, when it is on `sys.path`, a place where `faulty` is installed as a third party's transport is."""
    metadata = folder / "weft_faulty-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: weft-faulty\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[weft.transports]\nfaulty = {__name__}:factory\n")


class FaultyTransport:
    """`weft.contracts.Transport` around another one."""

    def __init__(self, inner: Transport, script: Script) -> None:
        self.inner, self._script = inner, script
        self._sends: dict[int, Bucket] = {}
        self._receives: dict[int, Bucket] = {}
        self._regions: Sequence[Region] = ()

    @property
    def capabilities(self) -> Capabilities:
        """The real one's."""
        return self.inner.capabilities

    def flip(self, bucket: int) -> None:
        """Change one byte of a bucket that has arrived here, as if it had changed on the way."""
        segment = self._receives[bucket].segments[0]
        self._regions[segment["region"]].memory[int(segment["offset"])] ^= 0x10

    def open(self, member: Member) -> None:
        """See `Transport.open`."""
        self.inner.open(member)

    def register(self, region: Region, deadline: Deadline) -> Registration:
        """See `Transport.register`."""
        return self.inner.register(region, deadline)

    def deregister(self, registration: Registration) -> None:
        """See `Transport.deregister`."""
        self.inner.deregister(registration)

    def address(self) -> bytes:
        """See `Transport.address`."""
        return self.inner.address()

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """See `Transport.connect`."""
        self.inner.connect(peer, address, deadline)

    def disconnect(self, peer: str) -> None:
        """See `Transport.disconnect`."""
        self.inner.disconnect(peer)

    def prepare(self, program: TransferProgram, deadline: Deadline) -> Prepared:
        """See `Transport.prepare`."""
        self._sends = {bucket.index: bucket for bucket in program.sends}
        self._receives = {bucket.index: bucket for bucket in program.receives}
        self._regions = program.regions
        return self.inner.prepare(program, deadline)

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """See `Transport.post`."""
        self._script.posting(self._sends[bucket], tag)
        return self.inner.post(prepared, bucket, tag, note, after)

    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """See `Transport.signal`."""
        if self._script.signalling(peer, tag, note):
            self.inner.signal(peer, tag, note)

    def poll(self) -> Sequence[Message]:
        """See `Transport.poll`."""
        return self._script.arriving(self, list(self.inner.poll()))

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """See `Transport.fence`."""
        self.inner.fence(prepared, bucket, tag, stream)

    def release(self, prepared: Prepared) -> None:
        """See `Transport.release`."""
        self.inner.release(prepared)

    def close(self) -> None:
        """See `Transport.close`."""
        self.inner.close()


factory = Factory(make, transport_api=1)
