"""The nixl transport keeps the contract, between real processes."""

from typing import ClassVar

from weft.testing.transports import TransportSuite


class TestNixl(TransportSuite):
    factory = "weft_nixl:factory"
    options: ClassVar = {"probe_seconds": 0.2, "chunk_segments": 500, "depth": 4}


class TestNixlPull(TransportSuite):
    factory = "weft_nixl:factory"
    options: ClassVar = {"direction": "pull", "probe_seconds": 0.2, "chunk_segments": 500, "depth": 4}
