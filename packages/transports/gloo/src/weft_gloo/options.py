"""Options of the `gloo` transport."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Bytes = Annotated[int, msgspec.Meta(ge=1)]


class GlooOptions(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="gloo"):
    """What `transport_options` may hold. The three sizes must be equal at all members."""

    host: str = ""
    """IP address or name to listen on, and that peers reach."""
    interface: str = ""
    """Or the network interface whose IPv4 address that is; by default the member's first NIC."""
    pack_below_bytes: _Bytes = 256 << 10
    """Segments shorter than this travel together in one message."""
    pack_bytes: _Bytes = 1 << 20
    """Size of such a message, and of each staging buffer."""
    depth: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "messages"})] = 4
    """Most messages in flight per peer and direction, and number of its staging buffers."""
