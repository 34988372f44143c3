"""What a refit is that sends every piece by itself: a dense copy, a blocking send, a blocking receive, a copy."""

from __future__ import annotations

import torch

from weft.contracts import Store
from weft.copies import Copies
from weft.deadline import Deadline
from weft.layout import Layout
from weft.slices import Slice
from weft.views import Memory, source_view, target_view
from weft_cli.bench import bare_gloo


class TensorByTensor:
    """One member's part, over gloo pairs of its own. Both ends go through the plan's copies in one order."""

    def __init__(
        self, store: Store, own: Slice, source: tuple[Layout, Memory] | None, target: tuple[Layout, Memory] | None,
        deadline: Deadline,
    ) -> None:  # fmt: skip
        copies, names = own.copies(), [member.name for member in own.members]
        nothing = torch.empty(0, dtype=torch.uint8)
        self._pairs: dict[tuple[str, str], bare_gloo.GlooPair] = {}
        ends = {(names[s], names[t]) for s, t in zip(copies.source, copies.target, strict=True) if s != t}
        for sender, receiver in sorted(ends):
            key = f"tensor-by-tensor/{sender}/{receiver}"
            self._pairs[sender, receiver] = bare_gloo.open_pair(
                store, key, sends=sender == own.name, memory=nothing, deadline=deadline
            )
        self._moves: list[tuple[tuple[str, str], torch.Tensor, bool]] = []
        for n in _order(own, copies):
            pair = names[copies.source[n]], names[copies.target[n]]
            if pair[0] == own.name and pair[0] != pair[1]:
                assert source is not None
                held = source[1][source[0].buffers[copies.source_buffer[n]].name]
                self._moves.append((pair, source_view(copies, n, held), True))
            elif pair[0] != pair[1]:
                assert target is not None
                wanted = target[1][target[0].buffers[copies.target_buffer[n]].name]
                self._moves.append((pair, target_view(copies, n, wanted), False))

    def run(self) -> None:
        """Send and receive everything once."""
        for pair, view, sends in self._moves:
            if sends:
                self._pairs[pair].send(view.contiguous()).wait()
            else:
                arrived = torch.empty(view.shape, dtype=view.dtype)
                self._pairs[pair].receive(arrived).wait()
                view.copy_(arrived)

    def close(self) -> None:
        """Let go of the pairs."""
        for pair in self._pairs.values():
            pair.close()
        self._pairs = {}


def _order(own: Slice, copies: Copies) -> list[int]:
    """Tensor by tensor: an order in which both ends of every copy come to it, so that blocking sends cannot lock up."""
    names = [member.name for member in own.members]
    keys = [
        (own.tensors[tensor].name, start, names[source], names[target], buffer, offset)
        for tensor, start, source, target, buffer, offset in zip(
            copies.tensor.tolist(), copies.logical_start.tolist(), copies.source.tolist(), copies.target.tolist(),
            copies.target_buffer.tolist(), copies.target_offset.tolist(), strict=True,
        )
    ]  # fmt: skip
    return sorted(range(len(copies)), key=keys.__getitem__)
