"""One rank of a live vLLM engine as target of a refit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.contracts import Event, Group, Stream
from weft.errors import LayoutError, NotSupportedError
from weft.layout import ITEM_BYTES, Kind, Layout
from weft.streams import Finished
from weft_vllm.binding import RecordedLayout, record_layout
from weft_vllm.checkpoint import logical_tensors
from weft_vllm.compat import VllmConfig, check_parallelism, support
from weft_vllm.landing import Landing

_ALIGNMENT_BYTES = 64


class VllmTarget:
    """Implements `weft.contracts.Target` for the model of one vLLM worker.

    Weights land in place: the replica must be paused from `begin` to `commit`. Addresses of the engine's tensors never
    change; `prepare_commit` checks that (trap 53). After `abort` the weights may be mixed. Called from the worker's own
    thread.
    """

    framework = ("vllm", support.version)

    def __init__(self, model: torch.nn.Module, recorded: RecordedLayout, config: VllmConfig) -> None:
        self.recorded = recorded
        self._model = model
        self.version: int | None = None
        """The version that is installed; None before the first refit, and after an aborted one until the next commit.
        """
        self._memory = _memory(recorded)
        self._landing = Landing(model, recorded, self._memory, config)
        self._addresses = _addresses(model)
        self._landed: set[int] = set()
        self._beginning: int | None = None

    @classmethod
    def from_worker(cls, model: torch.nn.Module, config: VllmConfig, *, scratch_slots: int = 2) -> VllmTarget:
        """The target of a worker's `model`, by recording how it loads the checkpoint that vLLM's `config` names.

        Not collective; takes milliseconds for a dense model, seconds for thousands of experts. Raises what
        `record_layout` and `compat.check_parallelism` raise.
        """
        check_parallelism(config)
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        tensors = logical_tensors(config.model_config.model, config.model_config.hf_config, dtype)
        return cls(model, record_layout(model, tensors, scratch_slots=scratch_slots), config)

    def layout(self) -> Layout:
        """What this rank wants; equal ranks of equal engines give equal layouts."""
        return self.recorded.layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """Every buffer's memory: the engine's own for `live` ones, a kept arena for `scratch` ones."""
        return self._memory

    def begin(self, version: int) -> int:
        """Get ready to be written. The layout never changes, so its epoch is always 0."""
        self._landed.clear()
        self._beginning = version
        return 0

    def land(self, group: Group, stream: Stream) -> Event:
        """Turn a group that has arrived into kernel format. Raises `LayoutError` when it has landed already."""
        if stream is not None:
            raise NotSupportedError("landing on a CUDA stream has not been built: pass None")
        if self._beginning is None or group.index in self._landed:
            raise LayoutError([f"group {group.name}: landed twice, or before a version was begun"])
        self._landing.land(group.index)
        self._landed.add(group.index)
        return Finished()

    def prepare_commit(self, version: int) -> None:
        """Check that everything landed and nothing moved. Raises `LayoutError` with all faults (traps 53 and 55)."""
        groups = self.recorded.layout.groups
        faults = [
            f"group {name}: never landed, its weights are old" for n, name in enumerate(groups) if n not in self._landed
        ]
        now = _addresses(self._model)
        faults += [
            f"{name}: moved from {self._addresses.get(name)} to {now.get(name)} since the engine started"
            for name in sorted(self._addresses.keys() | now.keys())
            if self._addresses.get(name) != now.get(name)
        ]
        if version != self._beginning:
            faults.append(f"version {version} is to be committed, but {self._beginning} was begun")
        if faults:
            raise LayoutError(faults)

    def commit(self, version: int) -> None:
        """The version is served from now on."""
        self.version, self._beginning = version, None

    def abort(self, version: int, error: BaseException) -> None:
        """Give up: whatever has landed is mixed with what has not."""
        self.version = self._beginning = None

    def never_written(self) -> int:
        """Elements of the engine's parameters that neither a piece nor a fill of the layout covers; 0, or recording is
        wrong.
        """
        layout = self.recorded.layout
        held = sum(slot.loaded.numel() for name, slot in self.recorded.slots.items() if name in self._memory)
        landed = {buffer.name for buffer in layout.buffers if buffer.name in self.recorded.slots}
        named = {buffer.name: n for n, buffer in enumerate(layout.buffers)}
        table = layout.pieces
        written = sum(int(table.numel[table.buffer == named[name]].sum()) for name in landed)
        for fill in layout.fills:
            written += int(torch.Size(fill.sizes).numel())
        return held - written

    def report(self) -> dict[str, Any]:
        """What there is to know about this rank, as plain values."""
        layout = self.recorded.layout
        kinds = {kind: sum(b.numel * ITEM_BYTES[b.dtype] for b in layout.buffers if b.kind is kind) for kind in Kind}
        return {
            "layout": layout.address,
            "buffers": len(layout.buffers),
            "pieces": len(layout.pieces),
            "groups": len(layout.groups),
            "live_bytes": kinds[Kind.LIVE],
            "scratch_bytes": kinds[Kind.SCRATCH],
            "never_written_elements": self.never_written(),
            "loader_landed": list(self.recorded.loader_landed),
            "skipped": [list(entry) for entry in layout.skipped],
        }


def _memory(recorded: RecordedLayout) -> dict[str, torch.Tensor]:
    """Every buffer's memory, one-dimensional. Scratch groups take turns in `scratch_slots` equal parts of one arena."""
    layout = recorded.layout
    memory: dict[str, torch.Tensor] = {}
    turns: dict[int, int] = {}
    offsets: dict[str, tuple[int, int]] = {}
    sizes: dict[int, int] = {}
    for buffer in layout.buffers:
        if buffer.kind is Kind.LIVE:
            live = recorded.slots[buffer.name].live.data
            memory[buffer.name] = torch.as_strided(live, (buffer.numel,), (1,), live.storage_offset())
            continue
        turn = turns.setdefault(buffer.group, len(turns))
        start = sizes.get(buffer.group, 0)
        nbytes = buffer.numel * ITEM_BYTES[buffer.dtype]
        offsets[buffer.name] = (turn % layout.scratch_slots, start)
        sizes[buffer.group] = start + -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    if offsets:
        part = max(sizes.values())
        device = next(iter(recorded.slots.values())).live.device
        arena = torch.zeros(part * min(layout.scratch_slots, len(turns)), dtype=torch.uint8, device=device)
        for buffer in layout.buffers:
            if buffer.name in offsets:
                slot, start = offsets[buffer.name]
                nbytes = buffer.numel * ITEM_BYTES[buffer.dtype]
                first = slot * part + start
                memory[buffer.name] = arena[first : first + nbytes].view(getattr(torch, buffer.dtype))
    return memory


def _addresses(model: torch.nn.Module) -> dict[str, int]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.data_ptr() for name, tensor in named}
