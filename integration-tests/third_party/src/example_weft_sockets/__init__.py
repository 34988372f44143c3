"""An example of a weft transport: one-sided writes over plain TCP sockets."""

from example_weft_sockets.transport import Options, SocketTransport
from weft.endpoint import Factory

__all__ = ["Options", "SocketTransport", "factory"]

factory = Factory(SocketTransport, transport_api=1, options=Options)
