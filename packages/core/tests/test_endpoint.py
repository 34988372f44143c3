"""What transports share: the book of registered regions, and the inbox."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from weft.contracts import Capabilities
from weft.endpoint import Envelope, Inbox, RegionBook
from weft.errors import ConfigError, PeerLostError
from weft.member import Region, Tag

CPU = Capabilities(one_sided=False, devices=("cpu",), members_may_change=False, direct_run_bytes=0, max_segments=1)


@pytest.mark.trap(31)
def test_a_region_is_refused_exactly_where_it_overlaps_a_registered_one() -> None:
    memory = torch.zeros(24, dtype=torch.uint8)
    taken = [(3, 6), (6, 8), (12, 20)]
    book = RegionBook("mine", CPU)
    for low, high in reversed(taken):
        book.add(Region(f"{low}:{high}", memory[low:high]))
    for low, high in itertools.combinations(range(25), 2):
        region = Region("new", memory[low:high])
        if any(low < end and start < high for start, end in taken):
            with pytest.raises(ConfigError, match="overlaps the registered"):
                book.check(region)
        else:
            book.check(region)
    assert book.remove(Region("12:20", memory[12:20]))
    book.check(Region("again", memory[8:24]))


@pytest.mark.parametrize("what", ["deliver", "lose", "stir"])
def test_whoever_waits_for_an_inbox_is_woken_by_what_comes_meanwhile_and_by_what_came_before(what: str) -> None:
    inbox = Inbox()
    inbox.admit("peer", "identity")
    acts = {
        "deliver": lambda: inbox.deliver("identity", Envelope(Tag(1, "peer", 0, 0), None, b"")),
        "lose": lambda: inbox.lose(PeerLostError("peer", "gone")),
        "stir": inbox.stir,
    }
    waiting = threading.Thread(target=inbox.wait, args=(3600.0,), daemon=True)
    waiting.start()
    acts[what]()
    waiting.join(60)
    assert not waiting.is_alive()
    inbox.stir()
    inbox.wait(3600.0)
