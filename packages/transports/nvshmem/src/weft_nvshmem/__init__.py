"""weft transport over NVSHMEM: puts into double-buffered slots of symmetric GPU memory. Never run on a GPU yet."""

from weft.endpoint import Factory
from weft_nvshmem.options import NvshmemOptions
from weft_nvshmem.transport import make_transport

__all__ = ["NvshmemOptions", "factory", "make_transport"]

factory = Factory(make_transport, transport_api=1, options=NvshmemOptions)
