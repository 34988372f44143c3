"""Layouts of vLLM ranks from a Hugging Face config and parallel sizes alone; vLLM need not be installed.

They equal what a live engine records (`weft_vllm.binding`), apart from the names of what it leaves out, when its
linears stay plain, as they do on GPUs and by default on CPU. Sources:
`vllm/model_executor/models/{llama,qwen2,qwen3}.py`, `layers/linear.py` (`QKVParallelLinear`: a rank's q, k and v rows
are stacked, KV heads are repeated when there are fewer than ranks; `MergedColumnParallelLinear`: gate over up, each
cut) and `layers/vocab_parallel_embedding.py` (rows padded to a multiple of 64, padding filled with 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.box import Affine, row_major
from weft.errors import ConfigError, NotSupportedError
from weft.layout import Layout, LayoutBuilder
from weft.verification import Request, Verification
from weft_vllm.verification import start_and_verify

_FAMILIES = ("llama", "qwen2", "qwen3")
_VOCABULARY_MULTIPLE = 64
_SCRATCH_SLOTS = 2
"""As `weft_vllm.engine.WeftInitInfo.scratch_slots`."""


@dataclass(frozen=True, slots=True)
class VllmAdapter:
    """Implements `weft.contracts.Adapter`. Every data-parallel rank of an engine is a replica of its own."""

    axes: tuple[str, ...] = ("tp", "dp")

    def world_size(self, parallel: Mapping[str, int]) -> int:
        """`tp · dp`. Raises `ConfigError` for sizes that are unknown or not positive."""
        faults = [f"{name}={size}: sizes are at least 1" for name, size in parallel.items() if size < 1]
        faults += [f"{name}: vllm has {', '.join(self.axes)}" for name in parallel if name not in self.axes]
        if faults:
            raise ConfigError("parallel sizes of a vllm engine: " + "; ".join(faults))
        return parallel.get("tp", 1) * parallel.get("dp", 1)

    def replicas(self, parallel: Mapping[str, int]) -> int:
        """`dp`."""
        self.world_size(parallel)
        return parallel.get("dp", 1)

    def layouts(self, config: Mapping[str, Any], parallel: Mapping[str, int], dtype: str) -> Sequence[Layout]:
        """The layout of every rank, replica after replica. Raises `NotSupportedError` for a family that is not mapped
        and `ConfigError` with every size that does not divide.
        """
        self.world_size(parallel)
        tp = parallel.get("tp", 1)
        model = _Model.read(config, tp)
        ranks = [_Rank(model, rank, tp, dtype).layout() for rank in range(tp)]
        return ranks * self.replicas(parallel)

    def verify(self, request: Request, report: Callable[[str], None]) -> Verification:
        """Implements `weft.verification.Verifier`: `weft verify vllm:tp2`. Raises what `start_and_verify` raises."""
        return start_and_verify(request, report)


@dataclass(frozen=True, slots=True)
class _Model:
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], tp: int) -> _Model:
        family = str(config.get("model_type"))
        if family not in _FAMILIES:
            raise NotSupportedError(
                f"weft-vllm maps {', '.join(_FAMILIES)} without an engine, not {family!r}; start one and record it"
            )
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        missing = [key for key in needed if not isinstance(config.get(key), int)]
        if missing:
            raise ConfigError(f"config of {family} lacks {', '.join(missing)}")
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        kv_heads = config.get("num_key_value_heads") or heads
        llama = family == "llama"
        attention_bias = llama and bool(config.get("attention_bias") or config.get("bias"))
        faults = [f"{what} {size} over tp {tp}" for what, size in (("heads", heads), ("MLP width", inner)) if size % tp]
        if max(kv_heads, tp) % min(kv_heads, tp):
            faults.append(f"KV heads {kv_heads} against tp {tp}")
        if _padded(config["vocab_size"]) % tp:
            faults.append(f"padded vocabulary {_padded(config['vocab_size'])} over tp {tp}")
        if faults:
            raise ConfigError(f"{family} does not divide: " + "; ".join(faults))
        return cls(
            hidden=config["hidden_size"],
            inner=inner,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias or (family == "qwen3" and bool(config.get("attention_bias"))),
            out_bias=attention_bias,
            mlp_bias=llama and bool(config.get("mlp_bias")),
            qk_norm=family == "qwen3",
        )


@dataclass(frozen=True, slots=True)
class _Rank:
    """Builds one rank's layout; buffers in the order in which vLLM registers its parameters."""

    model: _Model
    rank: int
    tp: int
    dtype: str

    def layout(self) -> Layout:
        """The layout."""
        builder, model = LayoutBuilder(scratch_slots=_SCRATCH_SLOTS), self.model
        self._vocabulary(builder, "model.embed_tokens.weight", "pre")
        for layer in range(model.layers):
            self._layer(builder, f"model.layers.{layer}")
        self._put(builder, "model.norm.weight", "post", [("model.norm.weight", (model.hidden,), 0, 0, model.hidden)])
        if model.tied:
            builder.tie("lm_head.weight", "model.embed_tokens.weight")
        else:
            self._vocabulary(builder, "lm_head.weight", "post")
        return builder.build()

    def _layer(self, builder: LayoutBuilder, group: str) -> None:
        model, tp = self.model, self.tp
        attention, mlp = f"{group}.self_attn", f"{group}.mlp"
        rows, head = model.heads // tp * model.head, model.head
        kv_rows = max(1, model.kv_heads // tp) * head
        kv_first = self.rank * model.kv_heads // tp * head
        ranges = [("q", model.heads * head, self.rank * rows, rows)]
        ranges += [(part, model.kv_heads * head, kv_first, kv_rows) for part in "kv"]
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            columns = (model.hidden,) if kind == "weight" else ()
            parts = [(f"{attention}.{p}_proj.{kind}", (total, *columns), 0, first, n) for p, total, first, n in ranges]
            self._put(builder, f"{attention}.qkv_proj.{kind}", group, parts)
        self._row_parallel(builder, f"{attention}.o_proj", group, model.heads * head, model.out_bias)
        for norm in ("q_norm", "k_norm") if model.qk_norm else ():
            self._put(
                builder, f"{attention}.{norm}.weight", group, [(f"{attention}.{norm}.weight", (head,), 0, 0, head)]
            )
        inner = model.inner // tp
        for kind in ("weight", "bias") if model.mlp_bias else ("weight",):
            shape = (model.inner, model.hidden) if kind == "weight" else (model.inner,)
            parts = [(f"{mlp}.{part}_proj.{kind}", shape, 0, self.rank * inner, inner) for part in ("gate", "up")]
            self._put(builder, f"{mlp}.gate_up_proj.{kind}", group, parts)
        self._row_parallel(builder, f"{mlp}.down_proj", group, model.inner, model.mlp_bias)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"{group}.{norm}.weight"
            self._put(builder, name, group, [(name, (model.hidden,), 0, 0, model.hidden)])

    def _row_parallel(self, builder: LayoutBuilder, name: str, group: str, columns: int, bias: bool) -> None:
        """A linear cut along its input: a range of columns, and the whole bias."""
        hidden, here = self.model.hidden, columns // self.tp
        self._put(builder, f"{name}.weight", group, [(f"{name}.weight", (hidden, columns), 1, self.rank * here, here)])
        if bias:
            self._put(builder, f"{name}.bias", group, [(f"{name}.bias", (hidden,), 0, 0, hidden)])

    def _vocabulary(self, builder: LayoutBuilder, name: str, group: str) -> None:
        """Rows of the padded vocabulary; what the last ranks have beyond its end is filled with 0."""
        model = self.model
        here = _padded(model.vocabulary) // self.tp
        first = min(self.rank * here, model.vocabulary)
        rows = min(here, model.vocabulary - first)
        shape = (model.vocabulary, model.hidden)
        self._put(builder, name, group, [(name, shape, 0, first, rows)] if rows else [], here * model.hidden)

    def _put(
        self,
        builder: LayoutBuilder,
        buffer: str,
        group: str,
        parts: Sequence[tuple[str, tuple[int, ...], int, int, int]],
        numel: int | None = None,
    ) -> None:
        """A buffer that stacks parts (tensor, shape, axis, first, count), filled with 0 up to `numel` elements."""
        filled = 0
        pieces = []
        for name, shape, axis, first, count in parts:
            sizes = (*shape[:axis], count, *shape[axis + 1 :])
            strides = row_major(shape)
            pieces.append(
                (name, shape, Affine(first * strides[axis], sizes, strides), Affine(filled, sizes, row_major(sizes)))
            )
            filled += math.prod(sizes)
        size = filled if numel is None else numel
        builder.buffer(buffer, self.dtype, size, group=group)
        for name, shape, logical, memory in pieces:
            builder.tensor(name, shape, self.dtype)
            builder.view(name, logical, buffer, memory)
        if filled < size:
            builder.fill(buffer, filled, (size - filled,), (1,))


def _padded(vocabulary: int) -> int:
    """Rows of the whole embedding, padding included."""
    return -(-vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


adapter = VllmAdapter()
