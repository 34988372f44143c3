"""What transports share: the book of registered regions."""

from __future__ import annotations

import itertools

import pytest
import torch

from weft.contracts import Capabilities
from weft.endpoint import RegionBook
from weft.errors import ConfigError
from weft.member import Region

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
