"""Options of the `nccl` transport."""

from __future__ import annotations

from typing import Annotated

import msgspec

from weft.options import one_of

_Bytes = Annotated[int, msgspec.Meta(ge=1)]


class NcclOptions(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="nccl"):
    """What `transport_options` may hold. The backend and the sizes of batches must be equal at all members."""

    backend: Annotated[str, one_of("nccl", "gloo")] = "nccl"
    """What moves the bytes: NCCL and GPU memory, or gloo and CPU memory, for tests and for a try without a GPU."""
    library: str = "libnccl.so.2"
    """NCCL itself: a name that the loader knows, which torch for CUDA brings, or a path."""
    host: str = ""
    """IP address or name to listen on for control messages, and that peers reach."""
    interface: str = ""
    """Or the network interface whose IPv4 address that is; by default the member's first NIC."""
    batch_bytes: _Bytes = 64 << 20
    """Most bytes that one group of operations moves."""
    operations: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "operations"})] = 256
    """Most operations of one group."""
    pack_below_bytes: _Bytes = 256 << 10
    """Segments shorter than this travel together, as one operation of their group."""
    staging_bytes: _Bytes = 8 << 20
    """Most bytes packed into one group; every channel has two buffers of this size at each end."""
    peers_at_once: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "peers"})] = 2
    """Most peers that bytes move to at one time, and as many from which they come."""
    blocks: Annotated[int, msgspec.Meta(ge=1, le=64, extra={"unit": "thread blocks"})] = 16
    """Most thread blocks, as many of the GPU's multiprocessors, that bytes to or from one peer take."""
