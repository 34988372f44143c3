"""The vision tower of a model, as vLLM's tensor-parallel ranks hold it (`mm_encoder_tp_mode="weights"`, its default).

Source: `vllm/model_executor/models/qwen2_5_vl.py` (`Qwen2_5_VisionTransformer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weft_vllm.feed_forward import Dense
from weft_vllm.fields import Fields
from weft_vllm.mesh import Place
from weft_vllm.parameters import Parameter, column_parallel, cut, row_parallel, vector, whole


@dataclass(frozen=True, slots=True)
class Vision:
    """A tower of Qwen2.5-VL."""

    depth: int
    hidden: int
    inner: int
    heads: int
    out: int
    """Width of the decoder."""
    patch: tuple[int, int, int, int]
    """Channels, frames, rows and columns of what becomes one vector."""
    merged: int
    """Width of the vectors that are merged into one of the decoder's."""

    def faults(self, tp: int) -> list[str]:
        """Sizes that do not divide."""
        cuts = (("vision heads", self.heads), ("vision MLP width", self.inner), ("vision merger width", self.merged))
        return [f"{what} {size} over tp {tp}" for what, size in cuts if size % tp]


def read_vision(fields: Fields) -> Vision:
    """The tower that a `vision_config` describes."""
    hidden, patch = fields.size("hidden_size"), fields.get("patch_size", 14)
    return Vision(
        depth=fields.size("depth"),
        hidden=hidden,
        inner=fields.size("intermediate_size"),
        heads=fields.size("num_heads"),
        out=fields.size("out_hidden_size"),
        patch=(fields.get("in_channels", 3), fields.get("temporal_patch_size", 2), patch, patch),
        merged=hidden * fields.get("spatial_merge_size", 2) ** 2,
    )


def tower(of: Vision, place: Place) -> Iterator[tuple[str, Parameter]]:
    """Group and parameter of all that vLLM's loading groups before the decoder; `last_norm` comes behind it."""
    embedding = "visual.patch_embed.proj.weight"
    yield "pre", Parameter(embedding, [whole(embedding, of.hidden, *of.patch)])
    for number in range(of.depth):
        block = f"visual.blocks.{number}"
        for parameter in _block(of, place, block):
            yield block, parameter
    narrow, wide = "visual.merger.mlp.0", "visual.merger.mlp.2"
    for kind, shape in (("weight", (of.merged, of.merged)), ("bias", (of.merged,))):
        yield narrow, column_parallel(f"{narrow}.{kind}", shape, place)
    for parameter in row_parallel(wide, of.out, of.merged, place, bias=True):
        yield wide, parameter


def last_norm(of: Vision) -> Parameter:
    """The one parameter of the tower that lands with the decoder's ends."""
    return vector("visual.merger.ln_q.weight", of.hidden)


def _block(of: Vision, place: Place, block: str) -> Iterator[Parameter]:
    for norm in (f"{block}.norm1.weight", f"{block}.norm2.weight"):
        yield vector(norm, of.hidden)
    here = of.hidden // place.mesh.tp
    for kind, columns in (("weight", (of.hidden,)), ("bias", ())):
        name = f"{block}.attn.qkv.{kind}"
        first = [part * of.hidden + place.tp_rank * here for part in range(3)]
        yield Parameter(name, [cut(name, (3 * of.hidden, *columns), 0, start, here) for start in first])
    yield from row_parallel(f"{block}.attn.proj", of.hidden, of.hidden, place, bias=True)
    yield from Dense(of.inner, bias=True).parameters(f"{block}.mlp", of.hidden, place)
