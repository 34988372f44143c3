"""From the parameters of one rank to its layout: where in memory each box of a logical tensor sits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from weft.box import Box
from weft.builder import LayoutBuilder
from weft.layout import Layout
from weft_megatron.family import DecoderModel, GatedDelta
from weft_megatron.parameters import Parameter, Stage
from weft_megatron.rows import Split
from weft_megatron.table import ties


def layout_of(
    model: DecoderModel,
    stage: Stage,
    held: Sequence[Parameter],
    dtypes: Mapping[str, str],
    skipped: Sequence[tuple[str, str]] = (),
) -> Layout:
    """The layout of one rank: one live buffer per parameter, dense and row-major, with its parameter's name.

    `dtypes` names the dtype of every parameter. `skipped` are local tensors left out, with reasons.
    """
    builder = LayoutBuilder()
    for parameter in held:
        dtype = dtypes[parameter.name]
        builder.buffer(parameter.name, dtype, math.prod(parameter.shape), group=parameter.group)
        _PLACE[parameter.split](builder, model, parameter, dtype)
    tensors = {name for parameter in held for name in parameter.logical}
    for alias, name in ties(model).items():
        if name in tensors:
            builder.tie(alias, name)
    for name, reason in skipped:
        builder.skip(name, reason)
    return builder.build()


def _replicated(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    (tensor,), (shape,) = parameter.logical, parameter.logical_shapes
    builder.tensor(tensor, shape, dtype)
    builder.shard(tensor, parameter.name)


def _rotary_last(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    (tensor,), (shape,) = parameter.logical, parameter.logical_shapes
    if not (model.latent and model.latent.indexer):
        raise AssertionError("only indexers have such rows")
    size, rotary, tail = model.latent.indexer.head, model.latent.rotary, shape[1:]
    row, heads, whole = math.prod(tail), shape[0] // size, tuple(0 for _ in tail)
    strides = (size * row, row, *(1 for _ in tail))
    builder.tensor(tensor, shape, dtype)
    for start, stop, offset in ((0, rotary, size - rotary), (rotary, size, 0)):
        if start < stop:
            box = Box((heads, size, *tail), (0, start, *whole), (heads, stop, *tail))
            builder.piece(tensor, box, parameter.name, offset * row, strides)


def _rows(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    (tensor,), (shape,) = parameter.logical, parameter.logical_shapes
    start = parameter.shape[0] * parameter.part.rank
    builder.tensor(tensor, shape, dtype)
    builder.shard(tensor, parameter.name, start=start, stop=start + parameter.shape[0])


def _columns(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    (tensor,), (shape,) = parameter.logical, parameter.logical_shapes
    start = parameter.shape[1] * parameter.part.rank
    builder.tensor(tensor, shape, dtype)
    builder.shard(tensor, parameter.name, axis=1, start=start, stop=start + parameter.shape[1])


def _vocabulary(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    (tensor,), (shape,) = parameter.logical, parameter.logical_shapes
    rows, hidden = parameter.shape
    start = rows * parameter.part.rank
    real = max(0, min(rows, model.vocabulary - start))
    if real:
        builder.tensor(tensor, shape, dtype)
        builder.shard(tensor, parameter.name, start=start, stop=start + real)
    if real < rows:
        builder.fill(parameter.name, real * hidden, (rows - real, hidden), (hidden, 1))


def _gated(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    rows, row = parameter.shape[0] // 2, math.prod(parameter.shape[1:])
    start = rows * parameter.part.rank
    for n, (tensor, shape) in enumerate(zip(parameter.logical, parameter.logical_shapes, strict=True)):
        builder.tensor(tensor, shape, dtype)
        builder.shard(tensor, parameter.name, start=start, stop=start + rows, offset=n * rows * row)


def _stacked_gated(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    """The stack is (experts, inputs, pairs of gate and up), a bias has no inputs; a parameter is (outputs, inputs)."""
    (tensor,), (shape,) = parameter.logical, parameter.logical_shapes
    rows, inputs = parameter.shape[0] // 2, parameter.shape[1:]
    builder.tensor(tensor, shape, dtype)
    start, expert = rows * parameter.part.rank, parameter.expert
    whole, wide = tuple(0 for _ in inputs), shape[-1] // 2
    for half in range(2):
        box = Box(
            (shape[0], *inputs, wide, 2),
            (expert, *whole, start, half),
            (expert + 1, *inputs, start + rows, half + 1),
        )
        width = math.prod(inputs)
        builder.piece(tensor, box, parameter.name, half * rows * width, (0, *(1 for _ in inputs), width, 0))


def _stacked_columns(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    """The stack is (experts, inputs, outputs), a bias has no inputs; a parameter is (outputs, inputs)."""
    (tensor,), (shape,) = parameter.logical, parameter.logical_shapes
    outputs, *columns = parameter.shape
    builder.tensor(tensor, shape, dtype)
    starts, expert = [width * parameter.part.rank for width in columns], parameter.expert
    stops = [start + width for start, width in zip(starts, columns, strict=True)]
    box = Box(shape, (expert, *starts, 0), (expert + 1, *stops, outputs))
    builder.piece(tensor, box, parameter.name, 0, (0, *(1 for _ in columns), math.prod(columns)))


def _legacy_gated(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    """In memory the parameter is (local experts, hidden, gate and up of this rank): `GroupedMLP.sharded_state_dict`."""
    hidden, columns = parameter.shape
    rows = columns // len(parameter.logical)
    start = rows * parameter.part.rank
    for n, (tensor, shape) in enumerate(zip(parameter.logical, parameter.logical_shapes, strict=True)):
        builder.tensor(tensor, shape, dtype)
        expert, half = divmod(n, 2)
        offset = expert * hidden * 2 * rows + half * rows
        builder.piece(tensor, Box(shape, (start, 0), (start + rows, hidden)), parameter.name, offset, (1, 2 * rows))


def _legacy_columns(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    """In memory the parameter is (local experts, width of this rank, hidden)."""
    width, hidden = parameter.shape[0] // len(parameter.logical), parameter.shape[1]
    start = width * parameter.part.rank
    for expert, (tensor, shape) in enumerate(zip(parameter.logical, parameter.logical_shapes, strict=True)):
        builder.tensor(tensor, shape, dtype)
        box = Box(shape, (0, start), (hidden, start + width))
        builder.piece(tensor, box, parameter.name, expert * width * hidden, (1, hidden))


def _grouped(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    """A group's rows are its query heads, its key head, its value head; ranks take equal runs of all groups' rows.

    A rank has whole groups, or, with more ranks than groups, some rows inside one group: then perhaps query rows only,
    or the end of a head and the start of the next. Megatron gathers activations before it uses them.
    """
    rows, tail = parameter.shape[0], parameter.shape[1:]
    row = math.prod(tail)
    first, low = divmod(rows * parameter.part.rank, model.group_rows)
    count, high = max(1, rows // model.group_rows), min(model.group_rows, low + rows)
    sizes = (model.queries * model.head, model.head, model.head)
    begins = accumulate(sizes, initial=0)
    for tensor, shape, size, begin in zip(parameter.logical, parameter.logical_shapes, sizes, begins, strict=False):
        start, stop = max(low, begin), min(high, begin + size)
        if start >= stop:
            continue
        builder.tensor(tensor, shape, dtype)
        box = Box(
            (model.groups, size, *tail),
            (first, start - begin, *(0 for _ in tail)),
            (first + count, stop - begin, *tail),
        )
        strides = (model.group_rows * row, row, *(1 for _ in tail))
        builder.piece(tensor, box, parameter.name, (start - low) * row, strides)


def _grouped_gated(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    """As `_grouped`; query rows and gate rows of a group are runs over heads, and a run may begin within one."""
    rows, tail, head = parameter.shape[0], parameter.shape[1:], model.head
    row, whole = math.prod(tail), tuple(0 for _ in tail)
    first, low = divmod(rows * parameter.part.rank, model.group_rows)
    count, high = max(1, rows // model.group_rows), min(model.group_rows, low + rows)
    query = model.queries * head
    begins = (0, query, 2 * query, 2 * query + head, model.group_rows)
    for part, (begin, end) in enumerate(pairwise(begins)):
        # Queries and gates are in one tensor.
        tensor, shape = parameter.logical[max(0, part - 1)], parameter.logical_shapes[max(0, part - 1)]
        start, stop = max(low, begin) - begin, min(high, end) - begin
        if start < stop:
            builder.tensor(tensor, shape, dtype)
        for at, to, inner, outer in _runs(start, stop, head):
            offset = (begin + at * head + inner - low) * row
            strides = (model.group_rows * row, head * row, row, *(1 for _ in tail))
            if part > 1:  # one head of keys or of values
                box = Box((model.groups, 1, head, *tail), (first, 0, inner, *whole), (first + count, 1, outer, *tail))
            else:
                box = Box(
                    (model.groups, model.queries, 2, head, *tail),
                    (first, at, part, inner, *whole),
                    (first + count, to, part + 1, outer, *tail),
                )
                strides = (*strides[:2], 0, *strides[2:])
            builder.piece(tensor, box, parameter.name, offset, strides)


def _runs(start: int, stop: int, head: int) -> Iterator[tuple[int, int, int, int]]:
    """The rows from `start` to `stop` as ranges of heads and of rows in each of them."""
    (at, inner), (to, outer) = divmod(start, head), divmod(stop, head)
    if inner and start < stop:
        yield at, at + 1, inner, head if at < to else outer
        at += 1
    if at < to:
        yield at, to, 0, head
    if outer and at <= to:
        yield to, to + 1, 0, outer


def _delta_inputs(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    delta = _delta(model)
    heads, each, hidden = delta.keys // parameter.part.size, delta.values // delta.keys, parameter.shape[1]
    first, offset, wide = heads * parameter.part.rank, 0, each * delta.value_head
    sizes = ((delta.key_head, delta.key_head, wide, wide), (each, each))
    for tensor, shape, parts in zip(parameter.logical, parameter.logical_shapes, sizes, strict=True):
        builder.tensor(tensor, shape, dtype)
        for begin, size in zip(accumulate(parts, initial=0), parts, strict=False):
            box = Box((delta.keys, sum(parts), hidden), (first, begin, 0), (first + heads, begin + size, hidden))
            builder.piece(tensor, box, parameter.name, offset * hidden, (size * hidden, hidden, 1))
            offset += heads * size


def _components(builder: LayoutBuilder, model: DecoderModel, parameter: Parameter, dtype: str) -> None:
    part, (tensor,), (shape,) = parameter.part, parameter.logical, parameter.logical_shapes
    builder.tensor(tensor, shape, dtype)
    begin, offset = 0, 0
    for rows in parameter.components:
        share = rows // part.size
        start = begin + share * part.rank
        builder.shard(tensor, parameter.name, start=start, stop=start + share, offset=offset * math.prod(shape[1:]))
        begin, offset = begin + rows, offset + share


def _delta(model: DecoderModel) -> GatedDelta:
    if model.delta is None:
        raise AssertionError("only linear attention has such parameters")
    return model.delta


_PLACE: Mapping[Split, Callable[[LayoutBuilder, DecoderModel, Parameter, str], None]] = {
    Split.REPLICATED: _replicated,
    Split.ROTARY_LAST: _rotary_last,
    Split.ROWS: _rows,
    Split.COLUMNS: _columns,
    Split.STACKED_GATED: _stacked_gated,
    Split.STACKED_COLUMNS: _stacked_columns,
    Split.LEGACY_GATED: _legacy_gated,
    Split.LEGACY_COLUMNS: _legacy_columns,
    Split.VOCABULARY: _vocabulary,
    Split.GATED: _gated,
    Split.GROUPED: _grouped,
    Split.GROUPED_GATED: _grouped_gated,
    Split.DELTA_INPUTS: _delta_inputs,
    Split.COMPONENTS: _components,
}
