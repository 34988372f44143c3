"""Broken targets: a small one that is honest, and others that do one thing wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from weft.builder import LayoutBuilder
from weft.contracts import Event, Group, Stream
from weft.formats import Format
from weft.layout import Kind, Layout
from weft.streams import Finished
from weft.testing.broken import Fault
from weft.testing.broken.sources import Never
from weft.testing.targets import Engine

ROWS, COLUMNS = 6, 4


class Honest:
    """Live `gate` and `up`, fused and padded; `down` and `norm` land in one scratch, by turns. `down` is transposed."""

    order = ("gate", "up")
    padding = True
    wanted: tuple[str, ...] = ("down", "norm")

    def __init__(self) -> None:
        self.fused = torch.zeros(2 * ROWS + 1, COLUMNS)
        self.down, self.norm = torch.zeros(ROWS, COLUMNS), torch.zeros(COLUMNS)
        scratch = torch.zeros(ROWS * COLUMNS)
        self.buffers = {"fused": self.fused.view(-1), "down": scratch, "norm": scratch[:COLUMNS]}

    def layout(self) -> Layout:
        builder = LayoutBuilder()
        builder.buffer("fused", "float32", self.fused.numel(), group="first")
        for index, name in enumerate(self.order):
            builder.tensor(name, (ROWS, COLUMNS), "float32")
            builder.shard(name, "fused", offset=index * ROWS * COLUMNS)
        if self.padding:
            builder.fill("fused", 2 * ROWS * COLUMNS, (COLUMNS,), (1,), 0.5)
        for name, shape, group in (("down", (COLUMNS, ROWS), "second"), ("norm", (COLUMNS,), "third")):
            if name not in self.wanted:
                continue
            builder.tensor(name, shape, "float32")
            builder.buffer(name, "float32", self.buffers[name].numel(), group=group, kind=Kind.SCRATCH)
            builder.shard(name, name)
        return builder.build()

    def memory(self) -> Mapping[str, torch.Tensor]:
        return self.buffers

    def begin(self, version: int) -> int:
        return 0

    def land(self, group: Group, stream: Stream) -> Event:
        if group.name == "second":
            self.down.copy_(self.buffers["down"].view(COLUMNS, ROWS).t())
        if group.name == "third":
            self.norm.copy_(self.buffers["norm"])
        return Finished()

    def prepare_commit(self, version: int) -> None:
        pass

    def commit(self, version: int) -> None:
        pass

    def abort(self, version: int, error: BaseException) -> None:
        pass

    def read(self) -> Mapping[str, torch.Tensor]:
        """The weights that are computed with."""
        return {"gate": self.fused[:ROWS], "up": self.fused[ROWS:-1], "down": self.down.t(), "norm": self.norm}

    def addresses(self) -> Mapping[str, int]:
        """Where they are."""
        return {name: getattr(self, name).data_ptr() for name in ("fused", "down", "norm")}


class Invents(Honest):
    """Has a format without a name, and an extra that is no text, of a tensor that it does not have."""

    def layout(self) -> Layout:
        extra: Any = {"bias": {"rows": 4}}
        return dataclasses.replace(super().layout(), formats={"gate": Format("")}, extra=extra)


class Drops(Honest):
    """Declares no padding, which keeps what it held."""

    padding = False


class Forgets(Honest):
    """Does not want one of its tensors."""

    wanted = ("down",)


class Repeats(Honest):
    """Turns a matrix that it has turned already."""

    turned = False

    def land(self, group: Group, stream: Stream) -> Event:
        super().land(group, stream)
        if group.name == "first" and self.turned:
            self.fused[:ROWS] = self.fused[:ROWS].flip(0)
        self.turned = self.turned or group.name == "third"
        return Finished()


class Reorders(Honest):
    """Takes gate for up."""

    order = ("up", "gate")


class Flips(Honest):
    """Changes the sign of one element."""

    def land(self, group: Group, stream: Stream) -> Event:
        super().land(group, stream)
        if group.name == "third":
            self.norm[1] *= -1
        return Finished()


class Lies(Honest):
    """Says that a group has landed and processes it in the end."""

    def land(self, group: Group, stream: Stream) -> Event:
        return Finished()

    def prepare_commit(self, version: int) -> None:
        self.norm.copy_(self.buffers["norm"])
        self.down.copy_(self.buffers["down"].view(COLUMNS, ROWS).t())


class ForgetsDeadlines(Honest):
    """Never finishes landing."""

    def land(self, group: Group, stream: Stream) -> Event:
        return Never()


class Moves(Honest):
    """Makes new memory for what it computes with."""

    def commit(self, version: int) -> None:
        self.down = self.down.clone()
        self.kept = [*getattr(self, "kept", []), self.down]


class Remembers(Honest):
    """Does not land again what had landed of a version that was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.landed: set[str] = set()

    def land(self, group: Group, stream: Stream) -> Event:
        if group.name not in self.landed:
            super().land(group, stream)
        self.landed.add(group.name)
        return Finished()

    def commit(self, version: int) -> None:
        self.landed.clear()


KINDS = {
    "honest": Honest, "drops": Drops, "forgets": Forgets, "repeats": Repeats, "reorders": Reorders, "flips": Flips,
    "lies": Lies, "forgets-deadlines": ForgetsDeadlines, "moves": Moves, "remembers": Remembers,
    "invents": Invents,
}  # fmt: skip


def engine(kind: str) -> Engine:
    """One of `KINDS`, as the suite takes it."""
    target = KINDS[kind]()
    return Engine(target, target.read, target.addresses)


_USED = "test_what_has_landed_is_what_is_used"
FAULTS = (
    Fault("drops", "test_every_element_is_claimed_once", "4 are claimed by none"),
    Fault("forgets", "test_nothing_that_is_computed_with_is_forgotten", "no refit would change ['norm']"),
    Fault(
        "repeats", "test_the_same_weights_twice_give_the_same_bits", "gave other bits: ['buffer fused', 'tensor gate']"
    ),
    Fault("reorders", _USED, "gate: 24 of 24 elements differ; up: 24 of 24 elements differ"),
    Fault("flips", _USED, "norm: 1 of 4 elements differ"),
    Fault("lies", "test_scratch_may_be_overwritten_once_its_group_has_landed", "scratch was still needed"),
    Fault("forgets-deadlines", "test_every_step_ends", "the event of group first has not ended", seconds=1),
    Fault("moves", "test_addresses_never_change", "captured graphs read the old memory: ['down']"),
    Fault("remembers", "test_a_version_that_was_given_up_leaves_no_trace_in_the_next", "after giving up with"),
    Fault(
        "invents", "test_what_is_said_of_tensors_is_consistent",
        "bias: an extra of no tensor; gate: a format needs a name; 4 is no text",
    ),
)  # fmt: skip
