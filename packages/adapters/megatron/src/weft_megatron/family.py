"""What weft-megatron knows about a decoder that Megatron-Core trains: sizes, biases, norms, ties, experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Indexer:
    """What chooses the keys that sparse attention looks at (DeepSeek-V3.2, GLM-5)."""

    heads: int
    """`index_n_heads`."""
    head: int
    """`index_head_dim`, of which as many elements have a position as in the attention's own heads."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-latent attention: queries, keys and values are projected up from short vectors (DeepSeek-V2 and later)."""

    query_rank: int | None
    """`q_lora_rank`: length of the vector that queries come from; None where they come from the hidden state."""
    key_rank: int
    """`kv_lora_rank`: length of the one that keys and values come from."""
    plain: int
    """`qk_nope_head_dim`: elements of a query or key head without a position."""
    rotary: int
    """`qk_rope_head_dim`: elements with one; those of the key are shared by all heads."""
    value: int
    """`v_head_dim`: elements of a value head."""
    indexer: Indexer | None = None
    """Where attention is sparse."""


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """Linear attention by the gated delta rule (`linear_*` of Qwen3-Next's config)."""

    keys: int
    """Heads of queries and of keys; each serves `values / keys` heads of values."""
    values: int
    """Heads of values, of gates, and of both rates."""
    key_head: int
    """Elements of a query or key head."""
    value_head: int
    """Elements of a value or gate head."""
    kernel: int
    """Steps that the convolution before it looks back."""
    layers: frozenset[int]
    """The layers that have it instead of attention, from 0."""


MAMBA, ATTENTION, MLP, EXPERTS = "M*-E"
"""Letters of `Hybrid.pattern`."""


@dataclass(frozen=True, slots=True)
class Hybrid:
    """Layers of one kind each instead of attention and an MLP in every layer, some of them Mamba 2 (Nemotron-H)."""

    pattern: str
    """A letter per layer, as in Megatron's `hybrid_override_pattern`."""
    heads: int
    """Heads of a Mamba layer, of its rates and of its skips."""
    head: int
    """Elements of one of them."""
    groups: int
    """Groups of heads that share what writes to the state and what reads it; a head group is normalized alone."""
    state: int
    """Elements of the state per element of a head."""
    kernel: int
    """Steps that the convolution looks back."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family's checkpoint calls a layer's router and experts, below `model.layers.N`."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "mlp.shared_experts"


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts in the sparse layers of a decoder."""

    count: int
    """Experts of one layer."""
    chosen: int
    """Experts that one token goes to."""
    intermediate: int
    """Width of one expert's gated MLP."""
    normalized: bool
    """Whether the chosen experts' weights add up to one (`norm_topk_prob`)."""
    layers: frozenset[int]
    """The layers that have experts instead of one MLP, from 0; prediction layers have the numbers after the last."""
    shared: int = 0
    """Width of the MLP that every token goes to besides; 0 without one."""
    shared_gate: bool = False
    """Whether each token weighs that MLP's output."""
    sigmoid: bool = False
    """Whether scores are sigmoids of the router's outputs, and not a softmax over them."""
    corrected: bool = False
    """Whether the choice, not the weight, of experts adds a float32 bias that balances them."""
    scale: float | None = None
    """Factor on the weights of the chosen experts."""
    groups: tuple[int, int] | None = None
    """Groups of experts, and from how many of them one token's experts come."""
    names: ExpertNames = ExpertNames()
    stacked: bool = False
    """Whether the checkpoint stacks a layer's experts in two transposed tensors, gate and up in alternating columns."""


@dataclass(frozen=True, slots=True)
class DecoderModel:
    """A decoder of attention and gated MLPs or experts, in the words of its Hugging Face config."""

    family: str
    """`model_type` of the config."""
    hidden: int
    layers: int
    """Decoder layers, without those that predict further tokens."""
    heads: int
    """Query heads."""
    groups: int
    """Key-value heads; each is a group with `heads / groups` query heads."""
    head: int
    """Elements of one head."""
    intermediate: int
    """Width of the MLP of a layer without experts."""
    vocabulary: int
    """Rows of the embedding on disk, without Megatron's padding."""
    tied: bool
    """Whether the output projection is the embedding."""
    qkv_bias: bool
    linear_bias: bool
    """Whether o, gate, up and down projections and routers have biases (Megatron's `add_bias_linear`)."""
    qk_norm: bool
    """Whether queries and keys, or the short vectors they come from, are normalized (Megatron's `qk_layernorm`)."""
    experts: Experts | None = None
    sinks: bool = False
    """Whether every query head has a logit of its own for attending to nothing, and gates are clamped (gpt-oss)."""
    output_gate: bool = False
    """Whether attention's output has a gate, whose rows follow those of its query head in `q_proj`."""
    zero_centered: bool = False
    """Whether norms, but for the one behind the delta rule, multiply by one more than their weights."""
    delta: GatedDelta | None = None
    hybrid: Hybrid | None = None
    """Where layers are of one kind each; MLPs and experts then have no gate."""
    latent: LatentAttention | None = None
    """Sizes of multi-latent attention where it takes the place of grouped queries."""
    predictors: int = 0
    """Layers after the last that predict one further token each (multi-token prediction)."""

    def predicting(self, count: int) -> DecoderModel:
        """The same with the first `count` of its prediction layers. Raises `ConfigError` when it has fewer."""
        if count > self.predictors:
            raise ConfigError(f"{self.family}: mtp={count}, the config has {self.predictors} prediction layers")
        return replace(self, predictors=count)

    @property
    def queries(self) -> int:
        """Query heads per group."""
        return self.heads // self.groups

    @property
    def group_rows(self) -> int:
        """Rows of Megatron's `linear_qkv` per group: its query heads, their gates, its key head, its value head."""
        return (self.queries * (2 if self.output_gate else 1) + 2) * self.head

    @property
    def sparse_layers(self) -> frozenset[int]:
        """The layers that have experts."""
        count = self.layers + self.predictors
        return frozenset(layer for layer in self.experts.layers if layer < count) if self.experts else frozenset()

    @property
    def dense_layers(self) -> frozenset[int]:
        """The layers that have one MLP and no experts."""
        if self.hybrid:
            return frozenset(layer for layer, kind in enumerate(self.hybrid.pattern) if kind == MLP)
        return frozenset(range(self.layers + self.predictors)) - self.sparse_layers
