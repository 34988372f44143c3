"""The conformance suite of targets. A plug-in's tests subclass it and say how one is made:

```python
class TestMine(TargetSuite):
    @pytest.fixture
    def make(self) -> Callable[[], Engine]:
        def engine() -> Engine:
            model = make_my_model()
            return Engine(MyTarget(model), model.state_dict, addresses=lambda: pointers(model))

        return engine
```

The target is one rank that wants whole tensors. Needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch

from weft.catalog import memory_faults
from weft.contracts import Target
from weft.layout import ITEM_BYTES, Kind
from weft.testing.members import poison
from weft.testing.memory import (
    all_unequal,
    bits,
    box_of,
    check_description,
    check_layouts,
    check_memory,
    groups,
)
from weft.testing.suite import Suite, within
from weft.views import apply_fills, piece_view, torch_dtype


@dataclass(frozen=True, slots=True)
class Engine:
    """A target, and what computes with its weights."""

    target: Target
    read: Callable[[], Mapping[str, torch.Tensor]]
    """The logical tensors that the engine would compute with now, whole, by other means than the target's own."""
    addresses: Callable[[], Mapping[str, int]]
    """Where the memory is that it computes with, by any names: what a captured graph would read."""
    derive: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] = dict
    """What `read` must give for these logical tensors: others, where the engine computes with derived ones."""
    fixed: frozenset[str] = frozenset()
    """What else `read` gives, and no refit changes: constants."""


class TargetSuite(Suite):
    """What every target must do on CPU."""

    @pytest.fixture
    def make(self) -> Callable[[], Engine]:
        """What makes an engine, each time a new one with equal layout. Subclasses override it."""
        raise NotImplementedError

    def test_equal_targets_have_one_layout_that_survives_the_wire(self, make: Callable[[], Engine]) -> None:
        engine, other = make(), make()
        first = engine.target.layout()
        self._install(engine, 1, weights(engine, 1))
        check_layouts(first, engine.target.layout(), other.target.layout())

    def test_memory_is_what_the_layout_says(self, make: Callable[[], Engine]) -> None:
        target = make().target
        layout, memory = target.layout(), target.memory()
        check_memory(layout, memory)
        assert Kind.PRODUCED not in {buffer.kind for buffer in layout.buffers}, "only sources have produced buffers"
        places = sorted(
            (memory[b.name].data_ptr(), b.numel * ITEM_BYTES[b.dtype], b.name)
            for b in layout.buffers
            if b.kind is Kind.LIVE
        )
        for (start, nbytes, name), (following, _, other) in pairwise(places):
            assert start + nbytes <= following, f"live buffers {name} and {other} share memory"

    def test_what_is_said_of_tensors_is_consistent(self, make: Callable[[], Engine]) -> None:
        check_description(make().target)

    @pytest.mark.trap(12, 13, 69)
    def test_every_element_is_claimed_once(self, make: Callable[[], Engine]) -> None:
        faults = memory_faults("the target", make().target.layout())
        assert not faults, "; ".join(faults)

    @pytest.mark.trap(3, 9)
    def test_nothing_that_is_computed_with_is_forgotten(self, make: Callable[[], Engine]) -> None:
        engine = make()
        known = {tie.alias for tie in engine.target.layout().ties} | engine.derive(weights(engine, 1)).keys()
        forgotten = sorted(engine.read().keys() - known - engine.fixed)
        assert not forgotten, f"no refit would change {forgotten}: the layout does not want them"

    @pytest.mark.trap(28, 55)
    def test_what_has_landed_is_what_is_used(self, make: Callable[[], Engine]) -> None:
        engine = make()
        for version in (1, 2):
            wanted = weights(engine, version)
            self._install(engine, version, wanted, spoil_scratch=False)
            wrong = all_unequal(engine.read(), engine.derive(wanted))
            assert not wrong, f"version {version} is not what is used: {wrong}"

    @pytest.mark.trap(28)
    def test_scratch_may_be_overwritten_once_its_group_has_landed(self, make: Callable[[], Engine]) -> None:
        engine = make()
        wanted = weights(engine, 1)
        self._install(engine, 1, wanted)
        wrong = all_unequal(engine.read(), engine.derive(wanted))
        assert not wrong, f"scratch was still needed after landing: {wrong}"

    @pytest.mark.trap(54)
    def test_the_same_weights_twice_give_the_same_bits(self, make: Callable[[], Engine]) -> None:
        engine = make()
        wanted, seen = weights(engine, 1), []
        live = [buffer.name for buffer in engine.target.layout().buffers if buffer.kind is Kind.LIVE]
        for version in (1, 2, 3):
            self._install(engine, version, wanted)
            memory = {f"buffer {name}": engine.target.memory()[name] for name in live}
            used = {f"tensor {name}": tensor for name, tensor in engine.read().items()}
            seen.append({name: bits(tensor) for name, tensor in {**memory, **used}.items()})
        changed = sorted({name for other in seen[1:] for name in other if not other[name].equal(seen[0][name])})
        assert not changed, f"the same weights gave other bits: {changed}"

    @pytest.mark.trap(53)
    def test_addresses_never_change(self, make: Callable[[], Engine]) -> None:
        engine = make()

        def places() -> dict[str, int]:
            memory = {f"buffer {name}": tensor.data_ptr() for name, tensor in engine.target.memory().items()}
            return {**memory, **engine.addresses()}

        before = places()
        for version in (1, 2):
            self._install(engine, version, weights(engine, version))
        after = places()
        moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        assert not moved, f"moved, while captured graphs read the old memory: {moved}"

    @pytest.mark.trap(48)
    def test_a_version_that_was_given_up_leaves_no_trace_in_the_next(self, make: Callable[[], Engine]) -> None:
        engine = make()
        count = len(engine.target.layout().groups)
        for version, landed in enumerate((0, count // 2, count)):
            self._install(engine, 2 * version, weights(engine, 100 + version), only=landed)
            engine.target.abort(2 * version, RuntimeError("given up by the suite"))
            wanted = weights(engine, version)
            self._install(engine, 2 * version + 1, wanted)
            wrong = all_unequal(engine.read(), engine.derive(wanted))
            assert not wrong, f"after giving up with {landed} of {count} groups landed: {wrong}"

    @pytest.mark.trap(40)
    def test_every_step_ends(self, make: Callable[[], Engine]) -> None:
        engine = make()
        self._install(engine, 1, weights(engine, 1))

    def _install(
        self,
        engine: Engine,
        version: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        spoil_scratch: bool = True,
        only: int | None = None,
    ) -> None:
        """What a refit does: into poisoned memory, group by group; with `only` that many groups and no commit."""
        target = engine.target
        layout, memory = target.layout(), target.memory()
        scratch = {buffer.name for buffer in layout.buffers if buffer.kind is Kind.SCRATCH}
        epoch = within(self.seconds, "begin", partial(target.begin, version))
        assert isinstance(epoch, int)
        for group in groups(layout)[:only]:
            poison([memory[name] for name in group.buffers])
            for piece in layout:
                if piece.buffer in group.buffers:
                    piece_view(piece, memory).copy_(box_of(tensors[piece.tensor], piece.box))
            apply_fills(layout, memory, group.index)
            event = within(self.seconds, f"landing group {group.name}", partial(target.land, group, None))
            within(self.seconds, f"the event of group {group.name}", event.synchronize)
            if spoil_scratch:
                poison([memory[name] for name in group.buffers if name in scratch])
        if only is None:
            within(self.seconds, "prepare_commit", partial(target.prepare_commit, version))
            within(self.seconds, "commit", partial(target.commit, version))


def weights(engine: Engine, seed: int) -> dict[str, torch.Tensor]:
    """Random logical tensors of the shapes and dtypes that a target wants."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for tensor in engine.target.layout().tensors:
        dtype = torch_dtype(tensor.dtype)
        if dtype.is_floating_point:
            made[tensor.name] = torch.randn(tensor.shape, generator=random).to(dtype)
        else:
            made[tensor.name] = torch.randint(0, 2 if dtype is torch.bool else 100, tensor.shape, generator=random).to(
                dtype
            )
    return made
