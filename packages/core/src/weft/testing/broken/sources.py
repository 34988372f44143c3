"""Broken sources: a small one that is honest, and others that do one thing wrong."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping

import torch

from weft.builder import LayoutBuilder
from weft.contracts import Event, Group, Lease, Stream
from weft.formats import CHECKPOINT, Acceptance
from weft.layout import Kind, Layout
from weft.live import HeldVersion
from weft.streams import Finished
from weft.testing.broken import Fault
from weft.testing.sources import Trainer

ROWS, COLUMNS = 6, 4


class Honest:
    """A live matrix `a` in two buffers and a merged matrix `b` that is produced; steps stay pending until `hold`."""

    def __init__(self) -> None:
        self.a = torch.arange(float(ROWS * COLUMNS))
        self.b = [torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(n)) for n in range(2)]
        half = ROWS * COLUMNS // 2
        produced = torch.empty(2 * ROWS * COLUMNS)
        self.buffers = {"a.top": self.a[:half], "a.bottom": self.a[half:], "b": produced}
        self.pending = 0

    def layout(self) -> Layout:
        builder = LayoutBuilder()
        builder.tensor("a", (ROWS, COLUMNS), "float32")
        for start, name in ((0, "a.top"), (ROWS // 2, "a.bottom")):
            builder.buffer(name, "float32", ROWS * COLUMNS // 2, group="first")
            builder.shard("a", name, start=start, stop=start + ROWS // 2)
        builder.tensor("b", (2 * ROWS, COLUMNS), "float32")
        builder.buffer("b", "float32", 2 * ROWS * COLUMNS, group="second", kind=Kind.PRODUCED)
        builder.shard("b", "b")
        return builder.build()

    def memory(self) -> Mapping[str, torch.Tensor]:
        return self.buffers

    def hold(self, version: int) -> Lease:
        for tensor in (self.a, *self.b):
            tensor += self.pending
        self.pending = 0
        return HeldVersion(version)

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        if "b" in out:
            out["b"].copy_(torch.cat(self.b).flatten())
        return Finished()

    def step(self) -> None:
        """What an optimizer would do: it counts from the next `hold` on."""
        self.pending += 1

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The weights with what is pending."""
        return {"a": self.a.view(ROWS, COLUMNS) + self.pending, "b": torch.cat(self.b) + self.pending}


class Drops(Honest):
    """Its layout has only half of the matrix."""

    def layout(self) -> Layout:
        builder = LayoutBuilder()
        builder.tensor("a", (ROWS, COLUMNS), "float32")
        builder.buffer("a.top", "float32", ROWS * COLUMNS // 2, group="first")
        builder.shard("a", "a.top", stop=ROWS // 2)
        return builder.build()

    def memory(self) -> Mapping[str, torch.Tensor]:
        return {"a.top": self.buffers["a.top"]}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"a": super().tensors()["a"]}


class Forgets(Honest):
    """A tensor of the model is neither in its layout nor skipped."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {**super().tensors(), "bias": torch.zeros(3)}


class Repeats(Honest):
    """Adds what it produces to what is there."""

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        if "b" in out:
            out["b"].add_(torch.cat(self.b).flatten())
        return Finished()


class Reorders(Honest):
    """Calls its top the bottom."""

    def memory(self) -> Mapping[str, torch.Tensor]:
        return {**self.buffers, "a.top": self.buffers["a.bottom"], "a.bottom": self.buffers["a.top"]}


class Flips(Honest):
    """Uses live memory for its own ends while it produces."""

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        self.a[3] += 1
        return super().produce(group, out, stream)


class Lies(Honest):
    """Promises bytes that are still to change."""

    def hold(self, version: int) -> Lease:
        return HeldVersion(version)


class ForgetsDeadlines(Honest):
    """What it produces is never ready."""

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        return Never()


class Never:
    """An event that is never reached."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        threading.Event().wait()


class Moves(Honest):
    """Gives a copy of its memory each time."""

    def memory(self) -> Mapping[str, torch.Tensor]:
        self.kept = [*getattr(self, "kept", []), {name: tensor.clone() for name, tensor in self.buffers.items()}]
        copies: dict[str, torch.Tensor] = self.kept[-1]
        return copies


class NamesItself(Honest):
    """Has a number of its own in its layout."""

    def layout(self) -> Layout:
        builder = LayoutBuilder()
        builder.tensor("a", (ROWS, COLUMNS), "float32")
        builder.buffer(f"a{id(self)}", "float32", ROWS * COLUMNS, group="first")
        builder.shard("a", f"a{id(self)}")
        return builder.build()

    def memory(self) -> Mapping[str, torch.Tensor]:
        return {f"a{id(self)}": self.a}


class Invents(Honest):
    """Speaks of a tensor that is not in its layout, and accepts what it does not receive."""

    framework = ("", "1.0")

    def layout(self) -> Layout:
        accepts = (Acceptance("packed"),)
        return dataclasses.replace(super().layout(), formats={"c": CHECKPOINT}, accepts=accepts)


KINDS = {
    "honest": Honest, "drops": Drops, "forgets": Forgets, "repeats": Repeats, "reorders": Reorders, "flips": Flips,
    "lies": Lies, "forgets-deadlines": ForgetsDeadlines, "moves": Moves, "names-itself": NamesItself,
    "invents": Invents,
}  # fmt: skip


def trainer(kind: str) -> Trainer:
    """One of `KINDS`, as the suite takes it."""
    source = KINDS[kind]()
    return Trainer(source, source.tensors, source.step)


FAULTS = (
    Fault("drops", "test_every_tensor_is_held", "elements that no piece holds: {'a': 12}"),
    Fault("forgets", "test_every_tensor_is_held", "neither held, tied nor skipped: ['bias']"),
    Fault("repeats", "test_what_was_in_a_produced_buffer_does_not_matter", "depends on what was there"),
    Fault("reorders", "test_every_piece_holds_its_box", "in buffer a.bottom: 12 of 12 elements differ"),
    Fault("flips", "test_bytes_do_not_change_while_a_lease_is_held", "changed under the lease: a.top: 1 of 12"),
    Fault("lies", "test_hold_finishes_what_is_pending", "held before the step was finished"),
    Fault("forgets-deadlines", "test_holding_and_producing_end", "producing group second has not ended", seconds=1),
    Fault("moves", "test_addresses_never_change", "moved: ['a.top', 'a.bottom', 'b']"),
    Fault("names-itself", "test_equal_sources_have_one_layout_that_survives_the_wire", "have different layouts"),
    Fault(
        "invents", "test_what_is_said_of_tensors_is_consistent", "c: a format of no tensor; framework is ('', '1.0')"
    ),
)
