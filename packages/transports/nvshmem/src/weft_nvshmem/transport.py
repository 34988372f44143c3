"""The `nvshmem` transport: turns of `weft.granted`, one at a time each way, over symmetric memory."""

from __future__ import annotations

from weft.batches import Limits
from weft.contracts import Capabilities
from weft.granted import GrantedTransport
from weft.hosts import choose_host
from weft_nvshmem.library import Library
from weft_nvshmem.network import NvshmemNetwork
from weft_nvshmem.options import NvshmemOptions

CAPABILITIES = Capabilities(
    one_sided=False,
    devices=("cuda",),
    members_may_change=False,
    direct_run_bytes=1 << 20,
    max_segments=1 << 20,
)
_EVERYTHING = 1 << 62


def make_transport(options: NvshmemOptions) -> GrantedTransport:
    """A transport that is not open yet."""
    return transport_over(NvshmemNetwork(options, Library()), options, CAPABILITIES)


def transport_over(network: NvshmemNetwork, options: NvshmemOptions, capabilities: Capabilities) -> GrantedTransport:
    """A transport that is not open yet, over a network that is not either."""
    return GrantedTransport(
        "nvshmem",
        network,
        capabilities,
        Limits(options.slot_bytes, 1, _EVERYTHING, options.slot_bytes),
        1,
        lambda member: choose_host("nvshmem", options.host, options.interface, member.nics),
    )
