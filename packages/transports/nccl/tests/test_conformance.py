"""The nccl transport keeps the contract between real processes, with torch's gloo in NCCL's place."""

from typing import ClassVar

from weft.testing.transports import TransportSuite


class TestNcclOverGloo(TransportSuite):
    factory = "weft_nccl:factory"
    options: ClassVar = {"backend": "gloo"}
