"""Options of the `nvshmem` transport."""

from __future__ import annotations

from typing import Annotated

import msgspec


class NvshmemOptions(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="nvshmem"):
    """What `transport_options` may hold. All but host and interface must be equal at all members."""

    members: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "members"})]
    """How many members there are in all: NVSHMEM's world is made once, by all of them together."""
    store: str
    """URL of the store where they meet, such as that of the job."""
    world: str
    """Name of this world in the store; a new one whenever members start anew."""
    host: str = ""
    """IP address or name to listen on for control messages, and that peers reach."""
    interface: str = ""
    """Or the network interface whose IPv4 address that is; by default the member's first NIC."""
    slot_bytes: Annotated[int, msgspec.Meta(ge=1 << 10)] = 32 << 20
    """Size of one slot; each member has two to receive into and two to send from."""
