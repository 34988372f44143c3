"""The example keeps the contract of transports, between real processes."""

from typing import ClassVar

from weft.testing.transports import TransportSuite


class TestSockets(TransportSuite):
    factory = "example_weft_sockets:factory"
    options: ClassVar = {"host": "127.0.0.1"}
