"""A link with a delay, apart from its rate, for kernels without `netem`: two Ethernet devices (TAP), between which a
thread holds every packet back.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import select
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
"""Of linux/if_tun.h."""
_PACKET_BYTES = 1 << 16
_LOOK_SECONDS = 0.2


@dataclass(eq=False)
class Delay:
    """Holds every packet back for `seconds`, either way, and counts how many crossings had to wait for each other."""

    seconds: float
    ends: tuple[int, int]
    """Descriptors of the two devices."""
    crossings: list[int] = field(default_factory=lambda: [0, 0])
    """Per end: the longest chain of packets, each of which left after the one before had arrived, up to one that has
    arrived here. Two are a round trip. Unlike time it does not depend on how busy the machine is.
    """

    def carry_on(self, ended: threading.Event) -> None:
        """Until it has ended."""
        flying: list[tuple[float, int, int, int, bytes]] = []
        count = itertools.count()
        while not ended.is_set():
            wait = min(_LOOK_SECONDS, max(0.0, flying[0][0] - time.monotonic())) if flying else _LOOK_SECONDS
            for end in select.select(self.ends, [], [], wait)[0]:
                here = self.ends.index(end)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        packet = os.read(end, _PACKET_BYTES)
                        due = time.monotonic() + self.seconds
                        heapq.heappush(flying, (due, next(count), 1 - here, self.crossings[here] + 1, packet))
            while flying and flying[0][0] <= time.monotonic():
                _, _, there, crossing, packet = heapq.heappop(flying)
                with contextlib.suppress(OSError):  # the link is down or its queue full: as on any wire, it is lost
                    os.write(self.ends[there], packet)
                self.crossings[there] = max(self.crossings[there], crossing)


def tap() -> tuple[str, int]:
    """A new device, by name, which lives as long as its descriptor is open, whatever namespace it is moved to. Skips
    the test where there can be none.
    """
    name = f"tap{uuid.uuid4().hex[:8]}"
    try:
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    except OSError as error:
        pytest.skip(f"network devices cannot be made here: {error}")
    return name, end


@contextlib.contextmanager
def delayed(seconds: float, ends: tuple[int, int]) -> Iterator[Delay]:
    """Carry packets between two devices."""
    delay, ended = Delay(seconds, ends), threading.Event()
    thread = threading.Thread(target=delay.carry_on, args=(ended,), name="delay", daemon=True)
    thread.start()
    try:
        yield delay
    finally:
        ended.set()
        thread.join()
        for end in ends:
            os.close(end)
