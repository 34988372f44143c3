"""Parts of parameters become the boxes they are, also where others of equal shape were seen before."""

from __future__ import annotations

from weft.builder import LayoutBuilder
from weft_vllm.parameters import Parameter, Part, Writer


def test_parts_of_one_shape_in_two_orders_stay_two() -> None:
    builder, writer = LayoutBuilder(), Writer("bfloat16")
    ranges = ((0, 4), (0, 4))
    for name, order in (("rows", None), ("columns", (1, 0)), ("rows again", (0, 1))):
        writer.put(builder, "layer", Parameter(name, [Part("weight", (4, 4), ranges, order)]))
    strides = {piece.buffer: piece.strides for piece in builder.build()}
    assert strides == {"rows": (4, 1), "columns": (1, 4), "rows again": (4, 1)}


def test_a_parameter_stacks_its_parts_and_is_filled_behind_them() -> None:
    builder, writer = LayoutBuilder(), Writer("bfloat16")
    parts = [Part("weight", (4, 4), ((1, 3), (0, 4))), Part("bias", (4,), ((0, 4),))]
    writer.put(builder, "layer", Parameter("both", parts, numel=16, dtype="float32"))
    layout = builder.build()
    assert [(piece.tensor, piece.offset) for piece in layout] == [("weight", 0), ("bias", 8)]
    assert [(fill.offset, fill.sizes) for fill in layout.fills] == [(12, (4,))]
    assert {tensor.dtype for tensor in layout.tensors} == {"float32"}
