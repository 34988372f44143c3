"""The gloo transport keeps the contract, between real processes."""

from typing import ClassVar

from weft.testing.transports import TransportSuite


class TestGloo(TransportSuite):
    factory = "weft_gloo:factory"
    options: ClassVar = {}
