"""weft transport over torch.distributed gloo: CPU memory, any network."""

from weft.endpoint import Factory
from weft_gloo.options import GlooOptions
from weft_gloo.transport import GlooTransport

__all__ = ["GlooOptions", "GlooTransport", "factory"]

factory = Factory(GlooTransport, transport_api=1, options=GlooOptions)
