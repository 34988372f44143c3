"""The mapped transport keeps the contract, between real processes."""

from typing import ClassVar

from weft.testing.transports import TransportSuite


class TestMapped(TransportSuite):
    factory = "weft_mapped:factory"
    options: ClassVar = {"chunk_bytes": 1 << 20}
