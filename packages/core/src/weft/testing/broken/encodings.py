"""Broken encodings: casts to bfloat16, each wrong in one way. They are entry points of no distribution."""

from __future__ import annotations

import threading
import time

import torch

from weft.testing.broken import Fault


class Drops:
    """Leaves the last element of an odd number unwritten."""

    name = "drops"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        kept = out.clone()
        out.copy_(source)
        if out.numel() % 2:
            out.flatten()[-1:] = kept.flatten()[-1:]


class Repeats:
    """Adds to what is there."""

    name = "repeats"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        out += source


class Reorders:
    """Reads memory in the order it lies in, whatever the strides say."""

    name = "reorders"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(torch.as_strided(source, (source.numel(),), (1,), source.storage_offset()).view(source.shape))


class Loses:
    """Writes to a dense copy of a strided destination."""

    name = "loses"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        out.reshape(-1).copy_(source.reshape(-1))


class Truncates:
    """Cuts bits off instead of rounding to nearest even."""

    name = "truncates"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        cut = source.contiguous().view(torch.int32) & -65536
        out.copy_(torch.where(source.isnan(), source, cut.view(torch.float32)))


class Lies:
    """Returns at once and writes later."""

    name = "lies"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        threading.Timer(0.5, out.copy_, [source]).start()


class ForgetsDeadlines:
    """Waits until no element is NaN."""

    name = "forgets-deadlines"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        while source.isnan().any():
            time.sleep(0.01)
        out.copy_(source)


class Overruns:
    """Writes one element more."""

    name = "overruns"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(source)
        end = out.storage_offset() + out.numel()
        if out.is_contiguous() and end < out.untyped_storage().nbytes() // out.element_size():
            torch.as_strided(out, (1,), (1,), end).zero_()


class Spoils:
    """Works in the memory of its source."""

    name = "spoils"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(source)
        source.clamp_(-1, 1)


class Scales:
    """Clamps to the largest finite element that it is shown, and calls that elementwise."""

    name = "scales"

    def encode(self, source: torch.Tensor, out: torch.Tensor) -> None:
        first = source.flatten()[:1].nan_to_num(0.0).abs()
        out.copy_(torch.where(source.abs() < first, torch.zeros_like(source), source))


drops, repeats, reorders, loses, truncates = Drops(), Repeats(), Reorders(), Loses(), Truncates()
lies, forgets_deadlines, overruns, spoils, scales = Lies(), ForgetsDeadlines(), Overruns(), Spoils(), Scales()

_EVERY_SIZE = "test_every_size_at_every_offset_is_written_and_nothing_beside_it"
_STRIDED = "test_strided_sources_and_destinations_are_followed"
FAULTS = (
    Fault("drops", _EVERY_SIZE, "1 of 1 elements"),
    Fault("repeats", "test_what_was_in_the_destination_does_not_matter", "what `out` held before: "),
    Fault("reorders", _STRIDED, "transposed, destination strides (120, 3, 1)"),
    Fault("loses", _STRIDED, "transposed, destination strides (1, 50, 2000)"),
    Fault("truncates", "test_every_value_is_what_the_reference_gives", "elements of torch.bfloat16 differ"),
    Fault("lies", "test_all_is_written_when_it_returns", "it writes later"),
    Fault("forgets-deadlines", "test_every_value_is_what_the_reference_gives", "has not ended within", seconds=1),
    Fault("overruns", _EVERY_SIZE, "were written"),
    Fault("spoils", "test_the_source_is_not_changed", "of the source were changed"),
    Fault("scales", "test_boxes_give_the_bits_of_the_whole", "box by box: "),
)
