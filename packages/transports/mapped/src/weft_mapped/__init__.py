"""weft transport between processes of one host: mapped memory, process_vm_writev, CUDA IPC."""

from weft.endpoint import Factory
from weft_mapped.options import MappedOptions
from weft_mapped.transport import MappedTransport

__all__ = ["MappedOptions", "MappedTransport", "factory"]

factory = Factory(MappedTransport, transport_api=1, options=MappedOptions)
