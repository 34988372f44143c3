"""weft transport over NCCL: GPU memory, grouped point-to-point operations in bounded lock-step batches."""

from weft.endpoint import Factory
from weft_nccl.options import NcclOptions
from weft_nccl.transport import make_transport

__all__ = ["NcclOptions", "factory", "make_transport"]

factory = Factory(make_transport, transport_api=1, options=NcclOptions)
