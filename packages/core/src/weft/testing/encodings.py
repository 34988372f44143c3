"""The conformance suite of encodings. A plug-in's tests subclass it and say what the values must be:

```python
class TestMine(EncodingSuite):
    name, dtypes = "mine", (("float32", "bfloat16"),)

    def reference(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return ...  # by other means than the encoding's own
```

Encodings are loaded by name, which must be an installed entry point of group `weft.encodings`. Needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import pytest
import torch

from weft.contracts import Encoding
from weft.plugins import load
from weft.testing.members import POISON, poison
from weft.testing.memory import bits
from weft.testing.suite import Suite, within
from weft.views import torch_dtype

SIZES = (0, 1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 63, 65, 127, 129, 1000)
"""Numbers of elements, around every width that a kernel may have."""
SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 1e-40, 1.00390625, 1.01171875, 3e38)
"""Signed zeros, infinities, NaN, subnormals, the two directions of a tie in bfloat16, and what overflows."""


class EncodingSuite(Suite):
    """What every encoding must do on CPU."""

    name: ClassVar[str]
    """Its entry point."""
    dtypes: ClassVar[Sequence[tuple[str, str]]]
    """(dtype of the source, dtype of the encoded values) that it can do."""
    elementwise: ClassVar[bool] = True
    """Whether an element's encoding depends on that element alone, so that boxes may be encoded one by one."""
    strided: ClassVar[bool] = True
    """Whether sources and destinations may be strided views."""

    def reference(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the encoded values of a dense `source` are, in its shape. Subclasses say it."""
        raise NotImplementedError

    @pytest.fixture
    def encoding(self) -> Encoding:
        """The plug-in."""
        plugin: Encoding = load("weft.encodings", self.name)
        return plugin

    def test_it_has_the_name_it_is_installed_under(self, encoding: Encoding) -> None:
        assert encoding.name == self.name

    def test_every_value_is_what_the_reference_gives(self, encoding: Encoding) -> None:
        for source, dtype in self._sources(70_000):
            out = torch.empty(len(source), dtype=dtype)
            self._encode(encoding, source, out)
            self._compare(out, self.reference(source, dtype), source)

    def test_every_size_at_every_offset_is_written_and_nothing_beside_it(self, encoding: Encoding) -> None:
        for source, dtype in self._sources(2000):
            for size in SIZES:
                for offset in range(4):
                    arena = _poisoned(size + 16, dtype)
                    out = arena[offset + 4 : offset + 4 + size]
                    self._encode(encoding, source[offset : offset + size], out)
                    self._compare(out, self.reference(source[offset : offset + size], dtype), source)
                    out.view(torch.uint8).fill_(POISON)
                    beside = int((arena.view(torch.uint8) != POISON).sum())
                    assert not beside, f"{beside} bytes beside the {size} elements of `out` were written"

    def test_what_was_in_the_destination_does_not_matter(self, encoding: Encoding) -> None:
        for source, dtype in self._sources(1000):
            outs = [torch.zeros(1000, dtype=dtype), torch.ones(1000, dtype=dtype), _poisoned(1000, dtype)]
            for out in outs:
                self._encode(encoding, source, out)
            for out in outs[1:]:
                self._compare(out, outs[0], source, "what `out` held before")

    def test_the_source_is_not_changed(self, encoding: Encoding) -> None:
        for source, dtype in self._sources(1000):
            before = bits(source)
            self._encode(encoding, source, torch.empty(1000, dtype=dtype))
            changed = int((bits(source) != before).sum())
            assert not changed, f"{changed} bytes of the source were changed"

    def test_all_is_written_when_it_returns(self, encoding: Encoding) -> None:
        for source, dtype in self._sources(1000):
            expected, out = self.reference(source, dtype), _poisoned(1000, dtype)
            self._encode(encoding, source, out)
            source.zero_()
            assert (bits(out) != POISON).any(), "nothing was there when `encode` returned: it writes later"
            self._compare(out, expected, expected)

    @pytest.mark.trap(38)
    def test_strided_sources_and_destinations_are_followed(self, encoding: Encoding) -> None:
        if not self.strided:
            pytest.skip("says that it needs dense tensors")
        for source, dtype in self._sources(3 * 40 * 50):
            expected = self.reference(source, dtype).view(3, 40, 50)
            views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
                "transposed": (lambda t: t.view(3, 40, 50).transpose(0, 2)),
                "columns": (lambda t: t.view(3, 40, 50)[:, :, 7:20]),
                "steps": (lambda t: t.view(3, 40, 50)[:, ::3, 1::2]),
            }
            for what, view in views.items():
                for out in (torch.empty(view(expected).shape, dtype=dtype), view(_poisoned(6000, dtype))):
                    self._encode(encoding, view(source), out)
                    strides = f"{what}, destination strides {out.stride()}"
                    self._compare(out, view(expected), view(source), strides)

    def test_boxes_give_the_bits_of_the_whole(self, encoding: Encoding) -> None:
        if not self.elementwise:
            pytest.skip("says that an element's encoding depends on others")
        for source, dtype in self._sources(64 * 64):
            whole, parts = torch.empty(64, 64, dtype=dtype), _poisoned(64 * 64, dtype).view(64, 64)
            square = source.view(64, 64)
            self._encode(encoding, square, whole)
            for rows in (slice(0, 1), slice(1, 30), slice(30, 64)):
                for start, stop in ((0, 33), (33, 64)):
                    part = torch.empty(square[rows, start:stop].shape, dtype=dtype)
                    self._encode(encoding, square[rows, start:stop].contiguous(), part)
                    parts[rows, start:stop] = part
            self._compare(parts, whole, square, "box by box")

    def _sources(self, count: int) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
        """Random bits and special values in every source dtype, with the dtype to encode to."""
        random = torch.Generator().manual_seed(count)
        for name, encoded in self.dtypes:
            dtype = torch_dtype(name)
            item = torch.empty(0, dtype=dtype).element_size()
            source = torch.randint(0, 256, (count * item,), generator=random, dtype=torch.uint8).view(dtype)
            if dtype.is_floating_point:
                special = torch.tensor(SPECIAL[:count]).to(dtype)
                source[-len(special) :] = special
            yield source, torch_dtype(encoded)

    def _encode(self, encoding: Encoding, source: torch.Tensor, out: torch.Tensor) -> None:
        what = f"encoding {source.numel()} elements of {source.dtype}"
        within(self.seconds, what, lambda: encoding.encode(source, out))

    @staticmethod
    def _compare(out: torch.Tensor, expected: torch.Tensor, source: torch.Tensor, what: str = "dense") -> None:
        """Equal bits, where any NaN equals any: torch's casts give other NaN at the end of a row than inside."""
        both_nan = (
            out.isnan() & expected.isnan() if out.is_floating_point() else torch.zeros_like(out, dtype=torch.bool)
        )
        same = (bits(out) == bits(expected)).all(1).view(out.shape)
        wrong = (~(same | both_nan)).nonzero().tolist()
        assert not wrong, (
            f"{what}: {len(wrong)} of {out.numel()} elements of {out.dtype} differ, the first at {wrong[0]}: "
            f"{out[tuple(wrong[0])].item()}, expected {expected[tuple(wrong[0])].item()}"
        )


def _poisoned(count: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty(count, dtype=dtype)
    poison([made])
    return made
