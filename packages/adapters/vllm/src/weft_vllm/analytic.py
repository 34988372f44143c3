"""Layouts of vLLM ranks from a Hugging Face config and parallel sizes alone; vLLM need not be installed.

They equal what a live engine records (`weft_vllm.binding`), apart from the names of what it leaves out, when its
weights stay plain, as they do on GPUs and, but for experts, by default on CPU; what an engine packs it records as
scratch. Sources:
`vllm/model_executor/models/{llama,qwen2,qwen3,qwen3_moe}.py`, `layers/linear.py` (`QKVParallelLinear`: a rank's q, k
and v rows are stacked, KV heads are repeated when there are fewer than ranks; `MergedColumnParallelLinear`: gate over
up, each cut), `layers/vocab_parallel_embedding.py` (rows padded to a multiple of 64, padding filled with 0) and
`layers/fused_moe/{config,expert_map_manager}.py` (experts stacked; with expert parallelism a rank has consecutive ones,
whole).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.box import Affine, row_major
from weft.builder import LayoutBuilder
from weft.errors import ConfigError, NotSupportedError
from weft.layout import Layout
from weft.verification import Request, Verification
from weft_vllm.verification import start_and_verify

_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_VOCABULARY_MULTIPLE = 64
_SCRATCH_SLOTS = 2
"""As `weft_vllm.engine.WeftInitInfo.scratch_slots`."""


@dataclass(frozen=True, slots=True)
class VllmAdapter:
    """Implements `weft.contracts.Adapter`.

    `ep` says that vLLM runs with `enable_expert_parallel`, and over how many ranks: always `tp · dp`. Without it every
    data-parallel rank of an engine is a replica of its own; with it all ranks share one forward pass.
    """

    axes: tuple[str, ...] = ("tp", "dp", "ep")

    def world_size(self, parallel: Mapping[str, int]) -> int:
        """`tp · dp`. Raises `ConfigError` for sizes that are unknown, not positive, or do not factor (trap 17)."""
        faults = [f"{name}={size}: sizes are at least 1" for name, size in parallel.items() if size < 1]
        faults += [f"{name}: vllm has {', '.join(self.axes)}" for name in parallel if name not in self.axes]
        tp, dp, ep = (parallel.get(axis, 1) for axis in ("tp", "dp", "ep"))
        if ep not in (1, tp * dp):
            faults.append(f"ep {ep} is not tp {tp} · dp {dp} = {tp * dp}: vLLM spreads experts over all its ranks")
        if faults:
            raise ConfigError("parallel sizes of a vllm engine: " + "; ".join(faults))
        return tp * dp

    def replicas(self, parallel: Mapping[str, int]) -> int:
        """`dp`, or 1 with expert parallelism."""
        return 1 if self.world_size(parallel) == parallel.get("ep", 1) else parallel.get("dp", 1)

    def layouts(self, config: Mapping[str, Any], parallel: Mapping[str, int], dtype: str) -> Sequence[Layout]:
        """The layout of every rank, replica after replica. Raises `NotSupportedError` for a family that is not mapped
        and `ConfigError` with every size that does not divide.
        """
        replicas, ranks = self.replicas(parallel), self.world_size(parallel)
        tp, ep = parallel.get("tp", 1), parallel.get("ep", 1)
        model = _Model.read(config, tp, replicas, ep)
        return [_Rank(model, rank % tp, tp, rank, ep, dtype).layout() for rank in range(ranks // replicas)] * replicas

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
    experts: int
    """0 for a dense model."""
    expert_inner: int
    dense_layers: frozenset[int]
    """Layers without experts."""

    @classmethod
    def read(cls, config: Mapping[str, Any], tp: int, replicas: int, ep: int) -> _Model:
        family = str(config.get("model_type"))
        if family not in _FAMILIES:
            raise NotSupportedError(
                f"weft-vllm maps {', '.join(_FAMILIES)} without an engine, not {family!r}; start one and record it"
            )
        mixture = family.endswith("_moe")
        if mixture and config.get("shared_expert_intermediate_size"):
            raise NotSupportedError(f"{family} with shared experts is not mapped yet; start an engine and record it")
        # Transformers writes the number of experts under another name than it reads
        experts = config.get("num_experts", config.get("num_local_experts")) if mixture else 0
        needed = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
        needed += ["moe_intermediate_size"] if mixture else []
        missing = [key for key in needed if not isinstance(config.get(key), int)]
        missing += [] if isinstance(experts, int) else ["num_experts"]
        if missing:
            raise ConfigError(f"config of {family} lacks {', '.join(missing)}")
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        kv_heads = config.get("num_key_value_heads") or heads
        llama, qwen3 = family == "llama", family.startswith("qwen3")
        layers, expert_inner = range(config["num_hidden_layers"]), config["moe_intermediate_size"] if mixture else 0
        step, plain = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        dense = frozenset(n for n in layers if not experts or n in plain or (n + 1) % step)
        attention_bias = llama and bool(config.get("attention_bias") or config.get("bias"))
        cut = [("heads", heads), *([("MLP width", inner)] if dense else ())]
        cut += [("expert width", expert_inner)] if ep == 1 else []
        faults = [f"{what} {size} over tp {tp}" for what, size in cut if size % tp]
        if experts and replicas > 1:
            faults.append(
                f"dp {replicas} without ep: vLLM then cuts every expert over all tp {tp} · dp {replicas} ranks, which "
                f"is not mapped; say ep{tp * replicas} for expert parallelism"
            )
        if ep > 1 and not experts:
            faults.append(f"ep {ep} of a model without experts")
        if experts and ep > experts:
            faults.append(f"experts {experts} over ep {ep}")
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
            experts=experts,
            expert_inner=expert_inner,
            dense_layers=dense,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias or (qwen3 and bool(config.get("attention_bias"))),
            out_bias=attention_bias,
            mlp_bias=llama and bool(config.get("mlp_bias")),
            qk_norm=qwen3,
        )


@dataclass(frozen=True, slots=True)
class _Rank:
    """Builds one rank's layout; buffers in the order in which vLLM registers its parameters."""

    model: _Model
    rank: int
    """Of its tensor-parallel group."""
    tp: int
    expert_rank: int
    ep: int
    dtype: str

    def layout(self) -> Layout:
        """The layout."""
        builder, model = LayoutBuilder(scratch_slots=_SCRATCH_SLOTS), self.model
        self._vocabulary(builder, "model.embed_tokens.weight", "pre")
        for layer in range(model.layers):
            self._layer(builder, f"model.layers.{layer}", layer in model.dense_layers)
        self._put(builder, "model.norm.weight", "post", [("model.norm.weight", (model.hidden,), 0, 0, model.hidden)])
        if model.tied:
            builder.tie("lm_head.weight", "model.embed_tokens.weight")
        else:
            self._vocabulary(builder, "lm_head.weight", "post")
        return builder.build()

    def _layer(self, builder: LayoutBuilder, group: str, dense: bool) -> None:
        model, tp = self.model, self.tp
        attention = f"{group}.self_attn"
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
        if dense:
            self._mlp(builder, f"{group}.mlp", group)
        else:
            self._experts(builder, f"{group}.mlp", group)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"{group}.{norm}.weight"
            self._put(builder, name, group, [(name, (model.hidden,), 0, 0, model.hidden)])

    def _mlp(self, builder: LayoutBuilder, mlp: str, group: str) -> None:
        model, inner = self.model, self.model.inner // self.tp
        for kind in ("weight", "bias") if model.mlp_bias else ("weight",):
            shape = (model.inner, model.hidden) if kind == "weight" else (model.inner,)
            parts = [(f"{mlp}.{part}_proj.{kind}", shape, 0, self.rank * inner, inner) for part in ("gate", "up")]
            self._put(builder, f"{mlp}.gate_up_proj.{kind}", group, parts)
        self._row_parallel(builder, f"{mlp}.down_proj", group, model.inner, model.mlp_bias)

    def _experts(self, builder: LayoutBuilder, mlp: str, group: str) -> None:
        """The router, and this rank's experts stacked: all of them cut, or with expert parallelism some of them whole,
        where the first ranks have one more when their number does not divide.
        """
        model, hidden, width = self.model, self.model.hidden, self.model.expert_inner
        router = (f"{mlp}.gate.weight", (model.experts, hidden), 0, 0, model.experts)
        self._put(builder, f"{mlp}.gate.weight", group, [router])
        every, more = divmod(model.experts, self.ep)
        first = self.expert_rank * every + min(self.expert_rank, more) if self.ep > 1 else 0
        here = [f"{mlp}.experts.{n}" for n in range(first, first + every + (self.expert_rank < more))]
        inner = width // self.tp if self.ep == 1 else width
        low = self.rank * inner if self.ep == 1 else 0
        gate_up = [(f"{e}.{part}_proj.weight", (width, hidden), 0, low, inner) for e in here for part in ("gate", "up")]
        down = [(f"{e}.down_proj.weight", (hidden, width), 1, low, inner) for e in here]
        self._put(builder, f"{mlp}.experts.routed_experts.w13_weight", group, gate_up)
        self._put(builder, f"{mlp}.experts.routed_experts.w2_weight", group, down)

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
