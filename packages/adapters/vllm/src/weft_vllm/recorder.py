"""Recording what weight loaders do, on tensors without storage.

Checkpoint tensors and parameters are stand-ins on torch's `meta` device. A view of a meta tensor keeps its storage,
offset and strides, so whatever chain of narrow, view, index, chunk, transpose a loader applies, the two ends of its
final `copy_` say which elements go where. Only five kinds of operation are understood: views, copies and casts of a
checkpoint tensor, `copy_` into a parameter, filling a parameter with a constant, and setting a whole checkpoint tensor
to zero, as loaders do on ranks that add nothing to a sum. Everything else that touches
checkpoint values or a parameter makes whatever is later written from it *derived*, with the checkpoint tensors that
went in; nothing is ever taken for a copy by guess (trap 70).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.box import Affine
from weft.errors import WeftError
from weft.layout import LogicalTensor
from weft_vllm.recording import Read, SlotRecord, Write, dense_numel

_WIDEST_ITEM_BYTES = 16
"""Storage per element of a stand-in, so that a cast of it can keep the element offsets of the original."""

aten = torch.ops.aten


class LoadRecordingError(WeftError):
    """The engine's own weight loading raised while it was recorded; the message names the checkpoint tensor it was
    given.
    """


def record(
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object],
    tensors: Sequence[LogicalTensor],
    slots: Mapping[str, torch.Tensor],
) -> dict[str, SlotRecord]:
    """Run `load` on stand-ins for the checkpoint's `tensors` and say what it wrote into each of `slots`.

    `slots` are the parameters' stand-ins, on the meta device, each with a storage of its own. Live tensors are not
    touched: a loader that still reaches one is an error. Raises `LoadRecordingError` when loading raises, or a stand-in
    was replaced.
    """
    recorder = _Recorder(slots)
    at = "nothing yet"

    def offered() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal at
        for tensor in tensors:
            at = tensor.name
            yield tensor.name, recorder.stand_in(tensor)

    try:
        with torch.no_grad(), recorder:
            load(offered())
    except LoadRecordingError:
        raise
    except Exception as error:
        raise LoadRecordingError(
            f"the engine's weight loading raised {type(error).__name__} at checkpoint tensor {at}: {error}. It needs "
            "values or does something that cannot be recorded; weft does not support this model"
        ) from error
    replaced = [name for name, tensor in slots.items() if _storage(tensor) not in recorder.slot_at]
    if replaced:
        raise LoadRecordingError(
            f"weight loading replaced the memory of {', '.join(replaced)}: it cannot land in place"
        )
    return recorder.records


@dataclass(frozen=True, slots=True)
class _Origin:
    """The checkpoint tensor behind a storage, and the dtypes it was cast to on the way."""

    tensor: str
    dtype: torch.dtype
    casts: tuple[torch.dtype, ...] = ()


class _Recorder(TorchDispatchMode):
    def __init__(self, slots: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records = {name: SlotRecord() for name in slots}
        self.slot_at = {_storage(tensor): name for name, tensor in slots.items()}
        self._first = {name: int(tensor.storage_offset()) for name, tensor in slots.items()}
        self._origins: dict[int, _Origin] = {}
        self._tainted: dict[int, set[str]] = {}
        self._why: dict[int, str] = {}
        self._changed: set[str] = set()
        self._zeroed: set[int] = set()
        self._keep: list[torch.Tensor] = []  # storages are known by identity, so none may be freed

    def stand_in(self, tensor: LogicalTensor) -> torch.Tensor:
        """A storage-free tensor for one checkpoint tensor."""
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        return self._on_new_storage(tensor.numel, dtype, 0, tensor.shape, None, _Origin(tensor.name, dtype))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and self._is_known(t)]
        if not known:
            return self._keep_result(func(*args, **kwargs))
        if func is aten.copy_.default:
            return self._copy(args[0], args[1])
        if func in (aten._to_copy.default, aten.clone.default) and _storage(args[0]) in self._origins:
            return self._cast(args[0], kwargs.get("dtype") or args[0].dtype)
        if func in (aten.fill_.Scalar, aten.zero_.default) and _storage(args[0]) in self.slot_at:
            return self._fill(args[0], float(args[1]) if len(args) > 1 else 0.0)
        if func is aten.zero_.default and self._is_whole(args[0]):
            self._zeroed.add(_storage(args[0]))
            self._changed.add(self._origins[_storage(args[0])].tensor)
            return args[0]
        result = self._keep_result(func(*args, **kwargs))
        if not (_is_view(func) and _is_plain_view(args[0], result)):
            self._compute(func, args, kwargs, known, result)
        return result

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        slot, origin = self.slot_at.get(_storage(target)), self._origins.get(_storage(source))
        if slot is None:
            if not target.is_meta:
                name = origin.tensor if origin else "a computed value"
                raise LoadRecordingError(f"a weight loader wrote {name} to a tensor of the live engine (trap 55)")
            self._taint(target, self._inputs(source) | self._inputs(target), f"copied over by {self._inputs(source)}")
            return target
        if _storage(source) in self._zeroed:
            return self._fill(target, 0.0)
        if origin is None or origin.tensor in self._changed:
            why = self._why.get(_storage(source), "a value that is not the checkpoint's is made")
            self._derive(slot, self._inputs(source), f"{why} before it is copied")
            return target
        record = self.records[slot]
        record.inputs.add(origin.tensor)
        values = source.expand(target.shape)
        view = Affine(int(values.storage_offset()), tuple(values.shape), tuple(values.stride()))
        if any(dtype != target.dtype for dtype in origin.casts):
            record.derived.append(
                f"{origin.tensor} goes through {', '.join(map(str, origin.casts))} on its way to {target.dtype}"
            )
        elif any(size > 1 and stride == 0 for size, stride in zip(view.sizes, view.strides, strict=True)):
            record.derived.append(f"{origin.tensor} is broadcast into it")
        elif target.numel():
            record.writes.append(Write(self._region(slot, target), Read(origin.tensor, view)))
        return target

    def _fill(self, target: torch.Tensor, value: float) -> torch.Tensor:
        slot = self.slot_at[_storage(target)]
        if target.numel():
            self.records[slot].writes.append(Write(self._region(slot, target), value))
        return target

    def _cast(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        origin = self._origins[_storage(source)]
        casts = origin.casts if dtype == source.dtype else (*origin.casts, dtype)
        numel = source.untyped_storage().nbytes() // _WIDEST_ITEM_BYTES
        copy = self._on_new_storage(
            numel,
            dtype,
            int(source.storage_offset()),
            source.shape,
            source.stride(),
            _Origin(origin.tensor, origin.dtype, casts),
        )
        if origin.tensor in self._changed:
            self._taint(copy, {origin.tensor}, "")
        return copy

    def _compute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: Sequence[torch.Tensor], result: Any
    ) -> None:
        """Any other operation: what it writes or returns is computed from everything it was given."""
        inputs = set().union(*(self._inputs(tensor) for tensor in known))
        why = f"{func} is applied"
        written = [t for t in tree_leaves(_written_arguments(func, args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for tensor in [*written, *outputs]:
            self._taint(tensor, inputs, why)

    def _taint(self, tensor: torch.Tensor, inputs: set[str], why: str) -> None:
        key = _storage(tensor)
        slot, origin = self.slot_at.get(key), self._origins.get(key)
        self._zeroed.discard(key)
        if slot is not None:
            self._derive(slot, inputs, why)
        elif origin is not None:
            self._changed.add(origin.tensor)
        else:
            self._tainted.setdefault(key, set()).update(inputs)
            self._why.setdefault(key, why)

    def _derive(self, slot: str, inputs: set[str], why: str) -> None:
        self.records[slot].inputs.update(inputs)
        self.records[slot].derived.append(why)

    def _inputs(self, tensor: torch.Tensor) -> set[str]:
        """The checkpoint tensors behind a tensor."""
        key = _storage(tensor)
        if key in self._origins:
            return {self._origins[key].tensor}
        if key in self.slot_at:
            return set(self.records[self.slot_at[key]].inputs)
        return set(self._tainted.get(key, ()))

    def _region(self, slot: str, target: torch.Tensor) -> Affine:
        return Affine(int(target.storage_offset()) - self._first[slot], tuple(target.shape), tuple(target.stride()))

    def _is_whole(self, tensor: torch.Tensor) -> bool:
        """Whether this is all of a checkpoint tensor or of a copy of one."""
        numel = tensor.untyped_storage().nbytes() // _WIDEST_ITEM_BYTES
        return _storage(tensor) in self._origins and dense_numel(tensor.shape, tensor.stride()) == numel

    def _is_known(self, tensor: torch.Tensor) -> bool:
        key = _storage(tensor)
        return key in self._origins or key in self.slot_at or key in self._tainted

    def _on_new_storage(
        self,
        numel: int,
        dtype: torch.dtype,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int] | None,
        origin: _Origin,
    ) -> torch.Tensor:
        whole = torch.empty(max(1, numel) * _WIDEST_ITEM_BYTES, dtype=torch.uint8, device="meta")
        dense = torch.empty(tuple(shape), dtype=dtype, device="meta").stride() if strides is None else tuple(strides)
        tensor = torch.empty(0, dtype=dtype, device="meta").set_(whole.untyped_storage(), offset, tuple(shape), dense)
        self._keep.append(tensor)
        self._origins[_storage(tensor)] = origin
        return tensor

    def _keep_result(self, result: Any) -> Any:
        self._keep += [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


def _storage(tensor: torch.Tensor) -> int:
    """Identity of the storage behind a tensor; meta tensors have no address."""
    return int(tensor.untyped_storage()._cdata)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_plain_view(source: Any, result: Any) -> bool:
    """Whether a view shows the same elements: not other bits of them, nor their conjugates or negatives."""
    outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    return isinstance(source, torch.Tensor) and all(
        t.dtype == source.dtype and not t.is_conj() and not t.is_neg() and _storage(t) == _storage(source)
        for t in outputs
    )


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[number] if number < len(args) else kwargs.get(argument.name))
    return written
