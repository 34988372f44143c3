"""The parameters of one vLLM rank, in the order in which vLLM registers them.

Sources: `vllm/model_executor/layers/linear.py` (`QKVParallelLinear`: a rank's q, k and v rows are stacked, KV heads are
repeated when there are fewer than ranks; `MergedColumnParallelLinear`: gate over up, each cut),
`layers/vocab_parallel_embedding.py` (rows padded to a multiple of 64, padding filled with 0),
`layers/fused_moe/config.py` (experts stacked; with expert parallelism whole) and `models/deepseek_v2.py`
(`fused_qkv_a_proj`: what narrows queries over what narrows keys and values, whole on every rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from weft.builder import LayoutBuilder
from weft.layout import Layout
from weft_vllm.families import Experts, GroupedQuery, Latent, Model
from weft_vllm.mesh import Mesh, Place
from weft_vllm.parameters import Parameter, Part, Writer, cut, whole
from weft_vllm.vision import last_norm, tower

_VOCABULARY_MULTIPLE = 64
_SCRATCH_SLOTS = 2
"""As `weft_vllm.engine.WeftInitInfo.scratch_slots`."""


def faults_of(model: Model, mesh: Mesh) -> list[str]:
    """Every size that does not divide, and what vLLM would do that is not mapped."""
    tp, attention, experts = mesh.tp, model.attention, model.experts
    cuts = [("heads", attention.heads), *([("MLP width", model.inner)] if model.dense_layers else ())]
    if experts and mesh.ep == 1:
        cuts.append(("expert width", experts.width))
    if experts and experts.shared_width and not _shared_whole(experts, mesh):
        cuts.append(("width of shared experts", experts.shared_width))
    cuts.append(("padded vocabulary", _padded(model.vocabulary)))
    faults = [f"{what} {size} over tp {tp}" for what, size in cuts if size % tp]
    if isinstance(attention, GroupedQuery):
        kv_heads = attention.kv_heads
        if max(kv_heads, tp) % min(kv_heads, tp):
            faults.append(f"KV heads {kv_heads} against tp {tp}")
        elif tp > kv_heads and not attention.repeats:
            faults.append(f"KV heads {kv_heads} against tp {tp}: vLLM does not repeat those of {model.family}")
    if model.vision is not None:
        faults += model.vision.faults(tp)
        faults += [f"pp {mesh.pp} of a model with a vision tower, which is not mapped"] if mesh.pp > 1 else []
    if mesh.pp > model.layers:
        faults.append(f"layers {model.layers} over pp {mesh.pp}")
    if not experts:
        return faults + ([f"ep {mesh.ep} of a model without experts"] if mesh.ep > 1 else [])
    if mesh.ep == 1 and mesh.dp > 1:
        faults.append(
            f"dp {mesh.dp} without ep: vLLM then cuts every expert over all tp {tp} · dp {mesh.dp} ranks, which is not "
            f"mapped; say ep{tp * mesh.dp} for expert parallelism, or replicas{mesh.dp} for engines of their own"
        )
    if experts.alternating and experts.count % mesh.ep:
        faults.append(
            f"experts {experts.count} over ep {mesh.ep}: vLLM loads equally many of {model.family} everywhere"
        )
    physical = experts.count + mesh.redundant
    if mesh.ep > physical:
        faults.append(f"experts {physical} over ep {mesh.ep}")
    if mesh.redundant and physical % mesh.ep:
        faults.append(f"experts {experts.count} + {mesh.redundant} redundant over ep {mesh.ep}: copies must divide")
    return faults


def build_layout(model: Model, place: Place, writer: Writer) -> Layout:
    """The layout of one rank. Sizes are known to divide."""
    builder, rank = LayoutBuilder(scratch_slots=_SCRATCH_SLOTS), _Rank(model, place)

    def put(group: str, parameter: Parameter) -> None:
        path = [model.engine_names.get(part, part) for part in parameter.name.split(".")]
        writer.put(builder, group, replace(parameter, name=model.engine_prefix + ".".join(path)))

    first = place.is_first or model.ends_everywhere
    last = place.is_last or model.ends_everywhere
    embedding = first or (last and model.tied)
    if model.vision is not None:
        for group, parameter in tower(model.vision, place):
            writer.put(builder, group, parameter)
    elif embedding:
        put("pre", rank.vocabulary("model.embed_tokens.weight"))
    for layer in place.layers(model.layers):
        group = f"model.layers.{layer}"
        for parameter in rank.layer(group, layer in model.dense_layers):
            put(model.engine_prefix + group, parameter)
    if model.vision is not None:  # its groups come before the embedding, which so lands last
        writer.put(builder, "post", last_norm(model.vision))
        put("post", rank.vocabulary("model.embed_tokens.weight"))
    if last:
        put("post", _vector("model.norm.weight", model.hidden))
        if not model.tied:
            put("post", rank.vocabulary("lm_head.weight"))
        elif not model.engine_prefix:  # ties are recorded where the engine's names are those of the checkpoint
            builder.tie("lm_head.weight", "model.embed_tokens.weight")
    return builder.build()


class _Rank:
    """Yields the parameters of one rank, module by module."""

    def __init__(self, model: Model, place: Place) -> None:
        self._model = model
        self._place = place
        self._mesh = place.mesh
        self._rank = place.tp_rank

    def layer(self, group: str, dense: bool) -> Iterator[Parameter]:
        """A decoder layer."""
        model = self._model
        attention, mlp = f"{group}.self_attn", f"{group}.{model.mlp}"
        if isinstance(model.attention, GroupedQuery):
            yield from self._grouped_query(attention, model.attention)
        else:
            yield from self._latent(attention, model.attention)
        if model.experts is None or dense:
            yield from self._gated(mlp, model.inner, model.mlp_bias)
        elif model.experts.alternating:
            yield from self._alternating_mixture(mlp, model.experts)
        else:
            yield from self._mixture(mlp, model.experts)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield _vector(f"{group}.{norm}.weight", model.hidden)

    def vocabulary(self, name: str) -> Parameter:
        """Rows of the padded vocabulary; what the last ranks have beyond its end is filled with 0."""
        model = self._model
        here = _padded(model.vocabulary) // self._mesh.tp
        first = min(self._rank * here, model.vocabulary)
        rows = min(here, model.vocabulary - first)
        parts = [cut(name, (model.vocabulary, model.hidden), 0, first, rows)] if rows else []
        return Parameter(name, parts, here * model.hidden)

    def _grouped_query(self, name: str, of: GroupedQuery) -> Iterator[Parameter]:
        tp, hidden = self._mesh.tp, self._model.hidden
        if of.sinks:
            heads = of.heads // tp
            yield Parameter(f"{name}.sinks", [cut(f"{name}.sinks", (of.heads,), 0, self._rank * heads, heads)])
        rows, kv_rows = of.heads // tp * of.head, max(1, of.kv_heads // tp) * of.head
        kv_first = self._rank * of.kv_heads // tp * of.head
        ranges = [("q", of.heads * of.head, self._rank * rows, rows)]
        ranges += [(part, of.kv_heads * of.head, kv_first, kv_rows) for part in "kv"]
        for kind in _kinds(of.qkv_bias):
            columns = (hidden,) if kind == "weight" else ()
            parts = [cut(f"{name}.{p}_proj.{kind}", (total, *columns), 0, first, n) for p, total, first, n in ranges]
            yield Parameter(f"{name}.qkv_proj.{kind}", parts)
        yield from self._row_parallel(f"{name}.o_proj", of.heads * of.head, of.out_bias)
        for norm in ("q_norm", "k_norm") if of.qk_norm else ():
            yield _vector(f"{name}.{norm}.weight", of.head)

    def _latent(self, name: str, of: Latent) -> Iterator[Parameter]:
        hidden, narrow = self._model.hidden, f"{name}.kv_a_proj_with_mqa.weight"
        query = of.heads * (of.plain_head + of.rotary_head)
        narrows = [whole(narrow, of.value_rank + of.rotary_head, hidden)]
        if of.query_rank is None:
            yield Parameter(narrow, narrows)
            yield self._column_parallel(f"{name}.q_proj.weight", query, hidden)
        else:
            queries = whole(f"{name}.q_a_proj.weight", of.query_rank, hidden)
            yield Parameter(f"{name}.fused_qkv_a_proj.weight", [queries, *narrows])
            yield _vector(f"{name}.q_a_layernorm.weight", of.query_rank)
            yield self._column_parallel(f"{name}.q_b_proj.weight", query, of.query_rank)
        yield _vector(f"{name}.kv_a_layernorm.weight", of.value_rank)
        keys_and_values = of.heads * (of.plain_head + of.value_head)
        yield self._column_parallel(f"{name}.kv_b_proj.weight", keys_and_values, of.value_rank)
        yield from self._row_parallel(f"{name}.o_proj", of.heads * of.value_head)

    def _gated(self, name: str, width: int, bias: bool = False, is_whole: bool = False) -> Iterator[Parameter]:
        """Gate over up, and down; cut, or whole on every rank."""
        hidden = self._model.hidden
        inner = width if is_whole else width // self._mesh.tp
        first = 0 if is_whole else self._rank * inner
        for kind in _kinds(bias):
            shape = (width, hidden) if kind == "weight" else (width,)
            parts = [cut(f"{name}.{part}_proj.{kind}", shape, 0, first, inner) for part in ("gate", "up")]
            yield Parameter(f"{name}.gate_up_proj.{kind}", parts)
        yield from self._row_parallel(f"{name}.down_proj", width, bias, is_whole)

    def _mixture(self, name: str, of: Experts) -> Iterator[Parameter]:
        """The router, shared experts, and this rank's experts stacked: all of them cut, or with expert parallelism some
        of them whole.
        """
        hidden, router = self._model.hidden, f"{name}.{of.router}"
        yield Parameter(f"{router}.weight", [whole(f"{router}.weight", of.count, hidden)], dtype=of.router_dtype)
        if of.corrected:
            bias = f"{router}.e_score_correction_bias"
            yield Parameter(bias, [whole(bias, of.count)], dtype="float32")
        if of.shared_width:
            yield from self._gated(f"{name}.shared_experts", of.shared_width, is_whole=_shared_whole(of, self._mesh))
        gate, up, down = of.projections
        here = [f"{name}.experts.{number}" for number in self._place.experts(of.count)]
        first, inner = self._width(of)
        shape = (of.width, hidden)
        w13 = [cut(f"{expert}.{part}.weight", shape, 0, first, inner) for expert in here for part in (gate, up)]
        w2 = [cut(f"{expert}.{down}.weight", (hidden, of.width), 1, first, inner) for expert in here]
        yield Parameter(f"{name}.experts.routed_experts.w13_weight", w13)
        yield Parameter(f"{name}.experts.routed_experts.w2_weight", w2)

    def _alternating_mixture(self, name: str, of: Experts) -> Iterator[Parameter]:
        """As `models/gpt_oss.py` loads experts that are not quantized: ranges of tensors that hold all of a layer, with
        the columns of the checkpoint as rows; gate and up stay alternating, and the first rank alone has the bias of
        what all ranks add up.
        """
        hidden, router, target = self._model.hidden, f"{name}.{of.router}", f"{name}.experts.routed_experts"
        yield Parameter(f"{router}.weight", [whole(f"{router}.weight", of.count, hidden)])
        yield _vector(f"{router}.bias", of.count)
        held = self._place.experts(of.count)
        here = (held[0], held[-1] + 1)
        first, inner = self._width(of)
        gate_up, down = (2 * first, 2 * (first + inner)), (first, first + inner)
        source, order = f"{name}.experts", (0, 2, 1)
        shape = (of.count, hidden, 2 * of.width)
        yield Parameter(
            f"{target}.w13_weight", [Part(f"{source}.gate_up_proj", shape, (here, (0, hidden), gate_up), order)]
        )
        yield Parameter(
            f"{target}.w13_bias", [Part(f"{source}.gate_up_proj_bias", (of.count, 2 * of.width), (here, gate_up))]
        )
        shape = (of.count, of.width, hidden)
        yield Parameter(f"{target}.w2_weight", [Part(f"{source}.down_proj", shape, (here, down, (0, hidden)), order)])
        bias = Part(f"{source}.down_proj_bias", (of.count, hidden), (here, (0, hidden)))
        yield Parameter(f"{target}.w2_bias", [bias] if first == 0 else [], bias.numel)

    def _width(self, of: Experts) -> tuple[int, int]:
        """First index and number of an expert's inner ones that this rank has: all with expert parallelism."""
        if self._mesh.ep > 1:
            return 0, of.width
        inner = of.width // self._mesh.tp
        return self._rank * inner, inner

    def _column_parallel(self, name: str, rows: int, columns: int) -> Parameter:
        """A linear cut along its output: a range of rows."""
        here = rows // self._mesh.tp
        return Parameter(name, [cut(name, (rows, columns), 0, self._rank * here, here)])

    def _row_parallel(self, name: str, columns: int, bias: bool = False, is_whole: bool = False) -> Iterator[Parameter]:
        """A linear cut along its input: a range of columns, and the whole bias."""
        hidden = self._model.hidden
        here = columns if is_whole else columns // self._mesh.tp
        first = 0 if is_whole else self._rank * here
        yield Parameter(f"{name}.weight", [cut(f"{name}.weight", (hidden, columns), 1, first, here)])
        if bias:
            yield _vector(f"{name}.bias", hidden)


def _vector(name: str, width: int) -> Parameter:
    """A vector that every rank has."""
    return Parameter(name, [whole(name, width)])


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _shared_whole(experts: Experts, mesh: Mesh) -> bool:
    return experts.shared_whole and mesh.sequence_parallel_experts


def _padded(vocabulary: int) -> int:
    """Rows of the whole embedding, padding included."""
    return -(-vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
