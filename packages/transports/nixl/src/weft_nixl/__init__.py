"""weft transport over NIXL: one-sided writes or reads by UCX (RDMA, CUDA IPC, shared memory, TCP)."""

from weft.endpoint import Factory
from weft_nixl.options import NixlOptions
from weft_nixl.transport import NixlTransport

__all__ = ["NixlOptions", "NixlTransport", "factory"]

factory = Factory(NixlTransport, transport_api=1, options=NixlOptions)
