"""The seams: what a framework, a network, a store, an allocator and an encoding must offer. Nothing here does anything.

Rules that hold for all of them: foreign exceptions are mapped to `weft.errors` inside the plug-in, once; nothing
blocks without a deadline; `close` may be called twice. Unless it says otherwise an object is used from one thread at
a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from weft.authentication import Key
from weft.deadline import Deadline
from weft.layout import Layout
from weft.member import Member, Region, RemoteRegion, Tag

TRANSPORT_API = 1
"""Grows when `Transport` changes so that plug-ins must change too; `weft.plugins.load` compares it with the factory's.
"""

LEASE_BYTES = 1 << 16
"""Largest value of a lease."""

SEGMENT = np.dtype(
    [
        ("region", "<i8"),
        ("offset", "<i8"),
        ("remote_region", "<i8"),
        ("remote_offset", "<i8"),
        ("nbytes", "<i8"),
    ]
)
"""One contiguous byte range: local region index and byte offset, the peer's region index and byte offset, length in
bytes.
"""


class Event(Protocol):
    """A point in a stream's work, CUDA's or an already finished one on CPU."""

    def query(self) -> bool:
        """Whether it has been reached."""
        ...

    def synchronize(self) -> None:
        """Block the host until it has been reached."""
        ...


Stream = torch.Stream | None
"""A CUDA stream, or None on CPU."""


class Lease(Protocol):
    """A source's promise that the bytes of one version do not change."""

    version: int

    def release(self) -> None:
        """End the promise. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Group:
    """A group of one member's layout, as handed to `produce` and `land`."""

    index: int
    name: str
    buffers: tuple[str, ...]
    """Names of its buffers."""


@runtime_checkable
class Source(Protocol):
    """One rank of a trainer (or of anything else that has weights)."""

    def layout(self) -> Layout:
        """What this rank holds. Called once per memory epoch."""
        ...

    def memory(self) -> Mapping[str, torch.Tensor]:
        """The memory of every buffer of `layout`: a dense one-dimensional tensor of the buffer's dtype and size.

        Buffers may be views of larger allocations; whole allocations are registered. Addresses stay valid for the
        memory epoch.
        """
        ...

    def hold(self, version: int) -> Lease:
        """Promise that bytes do not change until the lease is released; finishes pending gathers first (trap 66)."""
        ...

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        """Fill the `produced` buffers of a group: merge, gather, dequantize. May be collective among the sources."""
        ...


@runtime_checkable
class Target(Protocol):
    """One rank of an engine. Never decides about serving: that is `ReplicaControl`'s."""

    def layout(self) -> Layout:
        """What this rank wants. Called once per memory epoch."""
        ...

    def memory(self) -> Mapping[str, torch.Tensor]:
        """The memory of every buffer, as for `Source.memory`; scratch buffers of different groups may share it."""
        ...

    def begin(self, version: int) -> int:
        """Get ready to be written: drain what still moves weights. Returns the layout epoch that is now true."""
        ...

    def land(self, group: Group, stream: Stream) -> Event:
        """Post-process a group whose bytes have all arrived; afterwards its scratch may be overwritten.

        Called once per group and refit, in the order of `layout().groups`.
        """
        ...

    def prepare_commit(self, version: int) -> None:
        """Everything that may fail or is collective in the replica. Called on every member, only after all voted
        verified.
        """
        ...

    def commit(self, version: int) -> None:
        """Make the version the one that is served. Local; must not fail: no allocation, no collective."""
        ...

    def abort(self, version: int, error: BaseException) -> None:
        """Give up a version that was begun. In-place weights may be mixed: the replica must refuse to serve."""
        ...


@runtime_checkable
class OfFramework(Protocol):
    """A source or target that says whose weights it has. Others have no framework among their facts."""

    @property
    def framework(self) -> tuple[str, str]:
        """Name and version, such as `("vllm", "0.32.0")`."""
        ...


class ReplicaControl(Protocol):
    """Once per replica, beside its scheduler."""

    def pause(self, mode: str, deadline: Deadline) -> None:
        """Stop running forward passes; `mode` says what becomes of running requests (`abort`, `wait`, `keep`)."""
        ...

    def invalidate_caches(self, version: int) -> None:
        """Forget everything computed with other weights: prefix cache, encoder cache (trap 57)."""
        ...

    def resume(self, version: int) -> None:
        """Serve again, with `version`."""
        ...

    def refuse(self, reason: str) -> None:
        """Do not serve until a whole version is in: requests raise an error that gives the reason."""
        ...


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do, asked before planning. Numbers shape the plan and are part of its fingerprint."""

    one_sided: bool
    """Whether `post` writes into the peer's memory without the peer's help."""
    devices: tuple[str, ...]
    """Device types whose memory can be registered, such as `("cpu", "cuda")`."""
    members_may_change: bool
    """Whether a peer may leave and come back without everybody reconnecting."""
    direct_run_bytes: int
    """Contiguous runs at least this long move straight between final buffers; shorter ones are packed into staging."""
    max_segments: int
    """Most segments one bucket may have."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bounded list of segments that move together, seen from one of its two ends."""

    index: int
    """Unique in the plan, equal at both ends."""
    peer: str
    """The member at the other end."""
    segments: npt.NDArray[np.void]
    """dtype `SEGMENT`; equal order at both ends, with local and remote exchanged."""

    @property
    def nbytes(self) -> int:
        """Sum of the segments."""
        return int(self.segments["nbytes"].sum())


@dataclass(frozen=True, slots=True)
class TransferProgram:
    """All that a transport sees of a plan: one member's buckets of segments."""

    key: bytes
    """Digest of the plan and of every endpoint it was prepared for."""
    sends: tuple[Bucket, ...]
    receives: tuple[Bucket, ...]
    regions: tuple[Region, ...]
    """Local regions, by the index used in segments; all registered before."""
    remote_regions: Mapping[str, tuple[RemoteRegion, ...]]
    """Each peer's regions, by the index used in segments."""


class Registration(Protocol):
    """Memory that a transport may touch."""

    @property
    def region(self) -> Region:
        """What was registered."""
        ...


class Prepared(Protocol):
    """A program that a transport has made ready: descriptor lists, handles, posted buffers. Belongs to its
    transport.
    """

    @property
    def program(self) -> TransferProgram:
        """What was prepared."""
        ...


class Work(Protocol):
    """One posted bucket."""

    def poll(self) -> bool:
        """Whether the local side is finished (source bytes may change). Raises `TransportError` when it failed."""
        ...

    def cancel(self) -> None:
        """Give it up; the bytes may or may not arrive. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """Something that arrived: a bucket whose bytes are all in place, or a signal."""

    peer: str
    tag: Tag
    bucket: int | None
    """Index of the bucket, or None for a signal."""
    note: bytes
    """What the sender attached."""


class Transport(Protocol):
    """Moves byte ranges between registered regions of members, and small control messages.

    Only `connect`, `register` and `prepare` may wait, and they take a deadline. Everything else returns at once;
    whoever needs to wait polls (`Work.poll`, `Transport.poll`) under a deadline of its own, so that no silent peer
    can hold it (trap 40). Messages of one peer arrive in the order in which that peer's posts completed and signals
    were sent.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What it can do; the same before and after `open`."""
        ...

    def open(self, member: Member) -> None:
        """Bring up this endpoint. Once, first."""
        ...

    def register(self, region: Region, deadline: Deadline) -> Registration:
        """Make memory reachable: once per allocation and memory epoch."""
        ...

    def deregister(self, registration: Registration) -> None:
        """Undo `register`. Idempotent."""
        ...

    def address(self) -> bytes:
        """What a peer needs to connect and to reach the regions registered so far. Ask again after registering more."""
        ...

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        """Reach a peer; both sides call it. A new address for a known name replaces the old connection."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer; nothing of it is delivered afterwards. Idempotent."""
        ...

    def prepare(self, program: TransferProgram, deadline: Deadline) -> Prepared:
        """Make ready everything that does not depend on the version: once per plan and set of peers."""
        ...

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        """Start moving one of `program.sends`, once `after` is reached. The receiver gets `note` (at most 4 KiB)
        with the bytes.

        One active post per bucket; post again once its work is done.
        """
        ...

    def signal(self, peer: str, tag: Tag, note: bytes) -> None:
        """Send a small control message (at most 64 KiB). Raises `PeerLostError` when the peer is known to be gone."""
        ...

    def poll(self) -> Sequence[Message]:
        """What has arrived since the last call; does not wait. Raises `PeerLostError` once per peer found gone."""
        ...

    def fence(self, prepared: Prepared, bucket: int, tag: Tag, stream: Stream) -> None:
        """Make arrived bytes visible to `stream` (trap 34)."""
        ...

    def release(self, prepared: Prepared) -> None:
        """Undo `prepare`. Idempotent."""
        ...

    def close(self) -> None:
        """Release, deregister and disconnect everything, in that order. Idempotent."""
        ...


@runtime_checkable
class Waiting(Protocol):
    """A transport that can be waited for. Others are polled again and again while nothing happens."""

    def wait(self, seconds: float) -> None:
        """Until `poll` or a work may have something new since the last wait, or for `seconds`. May return early."""
        ...


@runtime_checkable
class Trusting(Protocol):
    """A transport with connections of its own, whose other ends can prove that they know a key."""

    def trust(self, key: Key) -> None:
        """From `open` on, hear nobody who does not prove to know this key. Called before `open`, if at all."""
        ...


class TransportFactory(Protocol):
    """What an entry point of group `weft.transports` yields. `weft.endpoint.Factory` makes one of a function."""

    @property
    def transport_api(self) -> int:
        """The `TRANSPORT_API` that the plug-in was written for: a number in its own code, not read from core."""
        ...

    def __call__(self, options: Mapping[str, Any]) -> Transport:
        """A transport that is not open yet. Raises `ConfigError` for options it does not know."""
        ...


class StoreLease(Protocol):
    """A key of a store that vanishes unless it is renewed: the sign of life of whoever holds it."""

    key: str
    seconds: float
    """How long the key stays after `Store.lease` or the last `renew`, by the store's own clock."""

    def renew(self) -> None:
        """Keep the key for its seconds from now on. Raises `StoreError` when it is lost: not renewed in time, or
        written, deleted or leased by somebody else since. A lost lease stays lost: take another.
        """
        ...

    def release(self) -> None:
        """Remove the key, if it is still this lease's. Idempotent."""
        ...


class Store(Protocol):
    """A small key-value service where members meet. Safe to use from several threads.

    A store that goes away is waited for: an operation whose connection breaks is asked again until its time is over,
    then a `StoreError` names the address and how long it was tried. So `set`, `delete` and `lease` may take effect
    twice, one time after the other; `add` counts once. A store that comes back without what it held is an error.
    """

    def set(self, key: str, value: bytes) -> None:
        """Write; replaces, and ends a lease. Readers see the old value or the new one, never a part of either."""
        ...

    def get(self, key: str) -> bytes | None:
        """Read, or None when there is nothing."""
        ...

    def add(self, key: str, amount: int) -> int:
        """Add to an integer that starts at 0, atomically; returns the sum. The key is then readable only through
        `add`.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove, if it is there."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Every key that starts with `prefix`, sorted."""
        ...

    def lease(self, key: str, value: bytes, seconds: float) -> StoreLease:
        """Write a value of at most `LEASE_BYTES` that vanishes when it has not been renewed for `seconds`; replaces."""
        ...

    def watch(self, key: str, known: bytes | None, deadline: Deadline) -> bytes | None:
        """What `key` holds, or None, as soon as it differs from `known`; at the deadline what it holds then.

        Waits without busy polling. What was replaced and put back meanwhile may go unseen. A connection that breaks is
        made anew and the question asked again, so that nothing is missed; a store that stays away is a `StoreError`.
        """
        ...

    def close(self) -> None:
        """Let go of the connection; a `watch` in another thread ends with `StoreError` soon. Idempotent."""
        ...


class Encoding(Protocol):
    """How values change on the way. `cast` is core's own; others are plug-ins."""

    name: str

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """Write the encoded values of `source` to `out`, which has the target's dtype and the same number of
        elements.
        """
        ...


class Allocator(Protocol):
    """Makes memory that a transport can register."""

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """One-dimensional uint8 tensor, a whole allocation of its own."""
        ...


class Adapter(Protocol):
    """What an entry point of group `weft.adapters` yields: layouts of a framework's ranks without the framework
    running.
    """

    axes: tuple[str, ...]
    """Parallel sizes it understands, by the framework's own flag names, such as `("tp", "pp", "dp")`."""

    def world_size(self, parallel: Mapping[str, int]) -> int:
        """Number of ranks. Raises `ConfigError` for sizes that do not factor, naming the numbers."""
        ...

    def replicas(self, parallel: Mapping[str, int]) -> int:
        """How many replicas those ranks form when they are targets; ranks of one replica are consecutive."""
        ...

    def layouts(self, config: Mapping[str, Any], parallel: Mapping[str, int], dtype: str) -> Sequence[Layout]:
        """The layout of every rank in rank order, from a Hugging Face config (as a mapping) and parallel sizes
        alone.
        """
        ...
