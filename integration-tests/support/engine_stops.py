"""The transport `stopping` of a vLLM worker: any other one, in a process that stops at steps and can be cut off."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from functools import cache
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from support.fleet import SIGNALS, Stop, cut_connections

from weft.contracts import Transport
from weft.endpoint import Factory
from weft.plugins import load
from weft.testing.faults import FaultyTransport
from weft.wire import Notice, Wire


def make(options: Mapping[str, Any]) -> FaultyTransport:
    """Options: `transport`, name of the real one; `transport_options`, its options; `address`, of who says where to
    stop.
    """
    inner: Transport = load("weft.transports", options["transport"])(options["transport_options"])
    return FaultyTransport(inner, stop_of(options["address"]))


@cache
def stop_of(address: str) -> Stop:
    """The one of this process. It stops before a notice is told, since a replica's only member tells itself most of
    them, which no transport sees.
    """
    pipe, striking = Client(address, "AF_UNIX"), Client(address, "AF_UNIX")
    pipe.send(("here", os.getpid()))
    stop, tell = Stop(pipe, listens=True), Wire.tell

    def stopping(wire: Wire, peer: str, version: int, notice: Notice) -> None:
        stop.reach(SIGNALS.get(notice.kind), version)
        tell(wire, peer, version, notice)

    def strike(number: int, _: object) -> None:
        if number == signal.SIGUSR1:
            cut_connections()
        else:
            stop.corrupts = True
        striking.send(number)

    signal.signal(signal.SIGUSR1, strike)
    signal.signal(signal.SIGUSR2, strike)
    Wire.tell = stopping  # type: ignore[method-assign]
    return stop


def install(folder: Path) -> None:
    """Make `folder`, when it is on `sys.path`, a place where `stopping` is installed."""
    metadata = folder / "weft_stopping-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: weft-stopping\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[weft.transports]\nstopping = {__name__}:factory\n")


factory = Factory(make, transport_api=1)
