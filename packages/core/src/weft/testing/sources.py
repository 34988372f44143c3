"""The conformance suite of sources. A plug-in's tests subclass it and say how one is made:

```python
class TestMine(SourceSuite):
    @pytest.fixture
    def make(self) -> Callable[[], Trainer]:
        def trainer() -> Trainer:
            model = make_my_model()
            return Trainer(MySource(model), model.state_dict, step=lambda: train(model))

        return trainer
```

Needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch

from weft.contracts import Lease, Source
from weft.layout import Kind, Layout
from weft.testing.members import poison
from weft.testing.memory import (
    all_unequal,
    box_of,
    check_description,
    check_layouts,
    check_memory,
    groups,
    piece_faults,
)
from weft.testing.suite import Suite, within


@dataclass(frozen=True, slots=True)
class Trainer:
    """A source, and the weights behind it."""

    source: Source
    tensors: Callable[[], Mapping[str, torch.Tensor]]
    """Every logical tensor that the source shares in, whole, as it is now, by other means than the source's own. More
    names than the layout's are allowed if the layout skips or ties them.
    """
    step: Callable[[], object] | None
    """Changes the weights as an optimizer's step does, finished or not; None: nothing ever changes them."""


class SourceSuite(Suite):
    """What every source must do on CPU."""

    whole: ClassVar[bool] = True
    """Whether the one rank that `make` makes holds every element of its tensors."""

    @pytest.fixture
    def make(self) -> Callable[[], Trainer]:
        """What makes a trainer, each time a new one with equal layout. Subclasses override it."""
        raise NotImplementedError

    def test_equal_sources_have_one_layout_that_survives_the_wire(self, make: Callable[[], Trainer]) -> None:
        trainer, other = make(), make()
        first = trainer.source.layout()
        self._hold(trainer, 1).release()
        check_layouts(first, trainer.source.layout(), other.source.layout())

    def test_memory_is_what_the_layout_says(self, make: Callable[[], Trainer]) -> None:
        source = make().source
        layout = source.layout()
        check_memory(layout, source.memory())
        assert Kind.SCRATCH not in {buffer.kind for buffer in layout.buffers}, "only targets have scratch"

    def test_what_is_said_of_tensors_is_consistent(self, make: Callable[[], Trainer]) -> None:
        check_description(make().source)

    @pytest.mark.trap(12, 13)
    def test_every_tensor_is_held(self, make: Callable[[], Trainer]) -> None:
        trainer = make()
        layout, tensors = trainer.source.layout(), trainer.tensors()
        named = {tensor.name for tensor in layout.tensors}
        silent = tensors.keys() - named - {tie.alias for tie in layout.ties} - {name for name, _ in layout.skipped}
        assert not silent, f"neither held, tied nor skipped: {sorted(silent)}"
        if self.whole:
            holes = {name: count for name, count in _holes(layout).items() if count}
            assert not holes, f"elements that no piece holds: {holes}"

    def test_every_piece_holds_its_box(self, make: Callable[[], Trainer]) -> None:
        trainer = make()
        lease = self._hold(trainer, 1)
        assert not (faults := piece_faults(trainer.source.layout(), trainer.source.memory(), trainer.tensors())), faults
        lease.release()

    def test_a_lease_names_its_version_and_is_released_twice(self, make: Callable[[], Trainer]) -> None:
        trainer = make()
        for version in (1, 2, 1 << 40):
            lease = self._hold(trainer, version)
            assert lease.version == version
            for _ in range(2):
                within(self.seconds, "release", lease.release)

    @pytest.mark.trap(65)
    def test_bytes_do_not_change_while_a_lease_is_held(self, make: Callable[[], Trainer]) -> None:
        trainer = make()
        lease = self._hold(trainer, 1)
        before = {name: tensor.clone() for name, tensor in trainer.source.memory().items()}
        self._produce(trainer)
        trainer.source.layout()
        changed = all_unequal(trainer.source.memory(), before)
        assert not changed, f"changed under the lease: {changed}"
        lease.release()

    @pytest.mark.trap(66)
    def test_hold_finishes_what_is_pending(self, make: Callable[[], Trainer]) -> None:
        trainer = make()
        before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
        for version in (1, 2):
            if trainer.step is not None:
                trainer.step()
            lease = self._hold(trainer, version)
            old = piece_faults(trainer.source.layout(), trainer.source.memory(), trainer.tensors())
            assert not old, f"held before the step was finished: {old}"
            lease.release()
        assert bool(all_unequal(trainer.tensors(), before)) is (trainer.step is not None), "`step` must change weights"

    @pytest.mark.trap(29)
    def test_addresses_never_change(self, make: Callable[[], Trainer]) -> None:
        trainer = make()
        places = {name: tensor.data_ptr() for name, tensor in trainer.source.memory().items()}
        for version in (1, 2):
            if trainer.step is not None:
                trainer.step()
            self._hold(trainer, version).release()
        moved = [name for name, tensor in trainer.source.memory().items() if tensor.data_ptr() != places[name]]
        assert not moved, f"moved: {moved}"

    @pytest.mark.trap(28)
    def test_what_was_in_a_produced_buffer_does_not_matter(self, make: Callable[[], Trainer]) -> None:
        trainer = make()
        lease = self._hold(trainer, 1)
        memory = trainer.source.memory()
        made = [memory[buffer.name] for buffer in trainer.source.layout().buffers if buffer.kind is Kind.PRODUCED]
        for spoil in (lambda: [tensor.zero_() for tensor in made], lambda: poison(made)):
            spoil()
            self._produce(trainer)
            wrong = piece_faults(trainer.source.layout(), memory, trainer.tensors())
            assert not wrong, f"depends on what was there: {wrong}"
        lease.release()

    @pytest.mark.trap(40)
    def test_holding_and_producing_end(self, make: Callable[[], Trainer]) -> None:
        self._hold(make(), 1).release()

    def _hold(self, trainer: Trainer, version: int) -> Lease:
        """Hold a version and produce all that is produced."""
        lease = within(self.seconds, f"hold of version {version}", lambda: trainer.source.hold(version))
        self._produce(trainer)
        return lease

    def _produce(self, trainer: Trainer) -> None:
        layout, memory = trainer.source.layout(), trainer.source.memory()
        made = {buffer.name for buffer in layout.buffers if buffer.kind is Kind.PRODUCED}
        for group in groups(layout):
            out = {name: memory[name] for name in group.buffers if name in made}
            if out:
                what = f"producing group {group.name}"
                event = within(self.seconds, what, partial(trainer.source.produce, group, out, None))
                within(self.seconds, f"the event of {what}", event.synchronize)


def _holes(layout: Layout) -> dict[str, int]:
    """By tensor, the number of elements that lie in no piece."""
    seen = {tensor.name: torch.zeros(tensor.shape, dtype=torch.bool) for tensor in layout.tensors}
    for piece in layout:
        box_of(seen[piece.tensor], piece.box).fill_(True)
    return {name: int((~mask).sum()) for name, mask in seen.items()}
