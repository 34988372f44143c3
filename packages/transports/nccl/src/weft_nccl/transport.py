"""The `nccl` transport: turns of `weft.granted` over two-member communicators, one per direction."""

from __future__ import annotations

from weft.batches import Limits
from weft.contracts import Capabilities
from weft.granted import GrantedTransport
from weft.hosts import choose_host
from weft.networks import Network
from weft_nccl.communicator import NcclNetwork
from weft_nccl.gloo import GlooNetwork
from weft_nccl.options import NcclOptions


def make_transport(options: NcclOptions) -> GrantedTransport:
    """A transport that is not open yet. Raises `ConfigError` for sizes that contradict each other."""
    limits = Limits(options.batch_bytes, options.operations, options.pack_below_bytes, options.staging_bytes)
    network: Network
    if options.backend == "nccl":
        device, network = (
            "cuda",
            NcclNetwork(options.library, options.staging_bytes, options.blocks, 2 * options.peers_at_once),
        )
    else:
        device, network = "cpu", GlooNetwork(options.staging_bytes)
    capabilities = Capabilities(
        one_sided=False,
        devices=(device,),
        members_may_change=True,
        direct_run_bytes=1 << 20,
        max_segments=1 << 20,
    )
    return GrantedTransport(
        "nccl",
        network,
        capabilities,
        limits,
        options.peers_at_once,
        lambda member: choose_host("nccl", options.host, options.interface, member.nics),
    )
