"""Megatron's sharding once more, with whole tensors and torch indexing only: the oracle of the layouts.

Written from Megatron's own words (the comments of `get_query_key_value_tensors`, `_initialize_affine_weight_cpu`,
`SequentialMLP`), and sharing no code with weft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where a rank stands: (rank, size) in each of its groups."""

    tp: tuple[int, int] = (0, 1)
    pp: tuple[int, int] = (0, 1)
    ep: tuple[int, int] = (0, 1)
    etp: tuple[int, int] = (0, 1)


def places(sizes: Mapping[str, int]) -> list[Place]:
    """Every rank's, in Megatron's default order: tp varies fastest, then dp, then pp; for experts etp, then ep."""
    tp, pp, dp, ep = (sizes.get(axis, 1) for axis in ("tp", "pp", "dp", "ep"))
    etp, stage = sizes.get("etp", tp), tp * dp
    return [
        Place((rank % tp, tp), (rank // stage, pp), (rank % stage // etp % ep, ep), (rank % etp, etp))
        for rank in range(stage * pp)
    ]


def experts_of(config: Mapping[str, Any]) -> int:
    """How many experts a sparse layer has."""
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return int(next((config[name] for name in names if name in config), 0))


def sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has experts."""
    match config["model_type"]:
        case "qwen3_moe" | "qwen3_next":
            step = config.get("decoder_sparse_step", 1)
            return layer not in config.get("mlp_only_layers", []) and (layer + 1) % step == 0
        case "mixtral" | "gpt_oss":
            return True
        case "deepseek_v3" | "kimi_k2" | "glm4_moe" | "glm_moe_dsa":
            return bool(layer >= config["first_k_dense_replace"])
    return False


def linear(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has the gated delta rule in the place of attention."""
    return config["model_type"] == "qwen3_next" and config["layer_types"][layer] == "linear_attention"


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> State:
    """Tensors of these shapes: every element of every tensor differs from all others."""
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    values = torch.randperm(total, generator=torch.Generator().manual_seed(seed)) + 1
    parts = values.to(torch.int32).view(torch.float32).split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def logical_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    count = config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(count + config.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{layer}."
        if layer >= count:
            shapes |= {at + f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
            shapes[at + "eh_proj.weight"] = (hidden, 2 * hidden)
        shapes |= {at + name + ".weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        attention = latent_shapes(config) if "kv_lora_rank" in config else attention_shapes(config)
        if linear(config, layer):
            shapes |= {f"{at}linear_attn.{name}": shape for name, shape in delta_shapes(config).items()}
        else:
            shapes |= {f"{at}self_attn.{name}": shape for name, shape in attention.items()}
        shapes |= {at + name: shape for name, shape in mlp_shapes(config, sparse(config, layer)).items()}
    return shapes


def attention_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of grouped-query attention."""
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"o_proj.weight": (hidden, query), "q_proj.weight": (query, hidden)}
    shapes |= {f"{part}_proj.weight": (key, hidden) for part in "kv"}
    if config["model_type"] == "qwen2" or config.get("attention_bias"):
        shapes |= {f"{part}_proj.bias": (query if part == "q" else key,) for part in "qkv"}
    if config.get("attention_bias") and config["model_type"] != "glm4_moe":
        shapes |= {"o_proj.bias": (hidden,)}
    if config["model_type"] == "gpt_oss":
        shapes |= {"sinks": (config["num_attention_heads"],)}
    if config["model_type"] in ("qwen3", "qwen3_moe", "qwen3_next") or config.get("use_qk_norm"):
        shapes |= {f"{part}_norm.weight": (head,) for part in "qk"}
    if config["model_type"] == "qwen3_next":
        shapes |= {"q_proj.weight": (2 * query, hidden)}
    return shapes


def delta_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of linear attention."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    return {
        "in_proj_qkvz.weight": (2 * keys + 2 * values, hidden),
        "in_proj_ba.weight": (2 * heads, hidden),
        "conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "norm.weight": (config["linear_value_head_dim"],),
        "out_proj.weight": (hidden, values),
    }


def latent_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of multi-latent attention."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotary, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (rank + rotary, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (plain + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }
    queries = heads * (plain + rotary)
    if config["model_type"] == "glm_moe_dsa":
        index_heads, size = config["index_n_heads"], config["index_head_dim"]
        shapes |= {
            "indexer.wq_b.weight": (index_heads * size, config["q_lora_rank"]),
            "indexer.wk.weight": (size, hidden),
            "indexer.k_norm.weight": (size,),
            "indexer.k_norm.bias": (size,),
            "indexer.weights_proj.weight": (index_heads, hidden),
        }
    if config["q_lora_rank"] is None:
        return shapes | {"q_proj.weight": (queries, hidden)}
    rank = config["q_lora_rank"]
    return shapes | {
        "q_a_proj.weight": (rank, hidden),
        "q_a_layernorm.weight": (rank,),
        "q_b_proj.weight": (queries, rank),
    }


def mlp_shapes(config: Mapping[str, Any], with_experts: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer's MLP, or of its router and experts."""
    hidden, count, family = config["hidden_size"], experts_of(config), config["model_type"]
    if not with_experts:
        return gated_shapes(config, "mlp.", config["intermediate_size"])
    if family == "gpt_oss":
        wide = config["intermediate_size"]
        return {
            "mlp.router.weight": (count, hidden),
            "mlp.router.bias": (count,),
            "mlp.experts.gate_up_proj": (count, hidden, 2 * wide),
            "mlp.experts.gate_up_proj_bias": (count, 2 * wide),
            "mlp.experts.down_proj": (count, wide, hidden),
            "mlp.experts.down_proj_bias": (count, hidden),
        }
    if family == "mixtral":
        shapes = {"block_sparse_moe.gate.weight": (count, hidden)}
        for expert in range(count):
            shapes |= gated_shapes(config, f"block_sparse_moe.experts.{expert}.", config["intermediate_size"], MIXTRAL)
        return shapes
    shapes = {"mlp.gate.weight": (count, hidden)}
    if config.get("mlp_bias"):
        shapes["mlp.gate.bias"] = (count,)
    for expert in range(count):
        shapes |= gated_shapes(config, f"mlp.experts.{expert}.", config["moe_intermediate_size"])
    if family == "qwen3_next" and config["shared_expert_intermediate_size"]:
        shapes |= gated_shapes(config, "mlp.shared_expert.", config["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    if family not in ("qwen3_moe", "qwen3_next"):
        shapes["mlp.gate.e_score_correction_bias"] = (count,)
        if config["n_shared_experts"]:
            shared = config["n_shared_experts"] * config["moe_intermediate_size"]
            shapes |= gated_shapes(config, "mlp.shared_experts.", shared)
    return shapes


USUAL, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
"""What families call the three linear layers of a gated MLP."""


def gated_shapes(
    config: Mapping[str, Any], at: str, width: int, names: tuple[str, str, str] = USUAL
) -> dict[str, tuple[int, ...]]:
    """Tensors of one gated MLP."""
    hidden, (gate, up, down) = config["hidden_size"], names
    shapes: dict[str, tuple[int, ...]] = {f"{at}{half}.weight": (width, hidden) for half in (gate, up)}
    shapes |= {f"{at}{down}.weight": (hidden, width)}
    if config.get("mlp_bias"):
        shapes |= {f"{at}{gate}.bias": (width,), f"{at}{up}.bias": (width,), f"{at}{down}.bias": (hidden,)}
    return shapes


@dataclass(frozen=True)
class Sharding:
    """Cuts a checkpoint as Megatron's modules do, for one rank."""

    config: Mapping[str, Any]
    state: State
    place: Place
    padded: int
    """Rows of the vocabulary with padding; padding rows are zero."""
    engine: bool = False
    """Whether modules are Transformer Engine's, which give every rank all of the projections to short vectors."""

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self.place.tp[1])[self.place.tp[0]]

    def columns(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self.place.tp[1], 1)[self.place.tp[0]]

    def vocabulary(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.rows(torch.cat([tensor, torch.zeros(self.padded - len(tensor), tensor.shape[1])]))

    def qkv(self, at: str, kind: str) -> torch.Tensor:
        groups, head = self.config["num_key_value_heads"], self.config["head_dim"]
        query, key, value = (self.state[f"{at}{part}_proj.{kind}"] for part in "qkv")
        gates: list[torch.Tensor] = []
        if self.config["model_type"] == "qwen3_next":
            # On disk the gate of each head follows it.
            query, gate = (part.flatten(0, 1) for part in query.reshape(-1, 2, head, query.shape[1]).unbind(1))
            gates = list(gate.chunk(groups))
        per_group = len(query) // groups
        grouped = []
        for group in range(groups):
            grouped.append(query[group * per_group : (group + 1) * per_group])
            grouped += gates[group : group + 1]
            grouped.append(key[group * head : (group + 1) * head])
            grouped.append(value[group * head : (group + 1) * head])
        return self.rows(torch.cat(grouped))

    def mlp(self, at: str, local: str, rank: int, ranks: int) -> State:
        state = self.state
        gate, up, down = MIXTRAL if "block_sparse_moe" in at else USUAL

        def gated(kind: str) -> torch.Tensor:
            return torch.cat([state[f"{at}{half}.{kind}"].chunk(ranks)[rank] for half in (gate, up)])

        found = {local + "linear_fc1.weight": gated("weight")}
        found[local + "linear_fc2.weight"] = state[f"{at}{down}.weight"].chunk(ranks, 1)[rank]
        if f"{at}{down}.bias" in state:
            found |= {local + "linear_fc1.bias": gated("bias"), local + "linear_fc2.bias": state[f"{at}{down}.bias"]}
        return found

    def stacked_mlp(self, at: str, local: str, expert: int, rank: int, ranks: int) -> State:
        """Of gpt-oss: outputs come last on disk, and gate and up take turns."""
        both, down = (self.state[f"{at}{name}_proj"][expert].T for name in ("gate_up", "down"))
        both_bias, down_bias = (self.state[f"{at}{name}_proj_bias"][expert] for name in ("gate_up", "down"))

        def halves(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor[half::2].chunk(ranks)[rank] for half in range(2)])

        return {
            local + "linear_fc1.weight": halves(both),
            local + "linear_fc1.bias": halves(both_bias),
            local + "linear_fc2.weight": down.chunk(ranks, 1)[rank],
            local + "linear_fc2.bias": down_bias,
        }

    def experts(self, layer: int, local: str) -> State:
        state, (rank, ranks) = self.state, self.place.ep
        at = f"model.layers.{layer}.{'block_sparse_moe' if self.config['model_type'] == 'mixtral' else 'mlp'}."
        router = "router" if self.config["model_type"] == "gpt_oss" else "gate"
        found = {local + "router.weight": state[f"{at}{router}.weight"]}
        if f"{at}{router}.bias" in state:
            found[local + "router.bias"] = state[f"{at}{router}.bias"]
        if at + "gate.e_score_correction_bias" in state:
            found[local + "router.expert_bias"] = state[at + "gate.e_score_correction_bias"]
        for shared in ("shared_experts.", "shared_expert."):
            if at + shared + "down_proj.weight" in state:
                found |= self.mlp(at + shared, local + "shared_experts.", *self.place.tp)
        if at + "shared_expert_gate.weight" in state:
            found[local + "shared_experts.gate_weight"] = state[at + "shared_expert_gate.weight"]
        for expert in torch.arange(experts_of(self.config)).chunk(ranks)[rank].tolist():
            own = f"{local}experts.local_experts.{expert}."
            if router == "router":
                found |= self.stacked_mlp(at + "experts.", own, expert, *self.place.etp)
            else:
                found |= self.mlp(f"{at}experts.{expert}.", own, *self.place.etp)
        return found

    def attention(self, at: str, local: str) -> State:
        state = self.state
        found = {local + "linear_qkv.weight": self.qkv(at, "weight")}
        if at + "q_proj.bias" in state:
            found[local + "linear_qkv.bias"] = self.qkv(at, "bias")
        if at + "q_norm.weight" in state:
            found[local + "q_layernorm.weight"] = state[at + "q_norm.weight"]
            found[local + "k_layernorm.weight"] = state[at + "k_norm.weight"]
        if at + "sinks" in state:
            found[local + "core_attention.softmax_offset"] = self.rows(state[at + "sinks"])
        return found

    def linear_attention(self, at: str, local: str) -> State:
        """On disk a key head's queries, keys, values and gates are together, and so are its two rates."""
        state, sizes = self.state, self.config
        heads, key = sizes["linear_num_key_heads"], sizes["linear_key_head_dim"]
        each = sizes["linear_num_value_heads"] // heads
        wide = each * sizes["linear_value_head_dim"]
        parts: list[torch.Tensor] = []
        for name, widths in (("qkvz", [key, key, wide, wide]), ("ba", [each, each])):
            per_head = state[f"{at}in_proj_{name}.weight"].reshape(heads, sum(widths), -1)
            parts += [part.flatten(0, 1) for part in per_head.split(widths, 1)]
        channels = state[at + "conv1d.weight"].split([heads * key, heads * key, heads * wide])
        return {
            local + "in_proj.weight": torch.cat([self.rows(part) for part in parts]),
            local + "conv1d.weight": torch.cat([self.rows(part) for part in channels]),
            local + "dt_bias": self.rows(state[at + "dt_bias"]),
            local + "A_log": self.rows(state[at + "A_log"]),
            local + "out_norm.weight": state[at + "norm.weight"],
            local + "out_proj.weight": self.columns(state[at + "out_proj.weight"]),
        }

    def latent_attention(self, at: str, local: str) -> State:
        state = self.state
        down = (lambda tensor: tensor) if self.engine else self.rows
        found = {
            local + "linear_kv_down_proj.weight": down(state[at + "kv_a_proj_with_mqa.weight"]),
            local + "linear_kv_up_proj.weight": self.rows(state[at + "kv_b_proj.weight"]),
            local + "kv_layernorm.weight": state[at + "kv_a_layernorm.weight"],
        }
        if at + "indexer.wk.weight" in state:
            found |= self.indexer(at + "indexer.", local + "core_attention.indexer.")
        if at + "q_proj.weight" in state:
            return found | {local + "linear_q_proj.weight": self.rows(state[at + "q_proj.weight"])}
        return found | {
            local + "linear_q_down_proj.weight": down(state[at + "q_a_proj.weight"]),
            local + "linear_q_up_proj.weight": self.rows(state[at + "q_b_proj.weight"]),
            local + "q_layernorm.weight": state[at + "q_a_layernorm.weight"],
        }

    def indexer(self, at: str, local: str) -> State:
        """Rotary elements lead every head on disk and end it in Megatron."""

        def turned(tensor: torch.Tensor) -> torch.Tensor:
            heads = tensor.reshape(-1, self.config["index_head_dim"], *tensor.shape[1:])
            return heads.roll(-self.config["qk_rope_head_dim"], 1).reshape(tensor.shape)

        state = self.state
        return {
            local + "linear_wq_b.weight": turned(state[at + "wq_b.weight"]),
            local + "linear_wk.weight": turned(state[at + "wk.weight"]),
            local + "k_norm.weight": turned(state[at + "k_norm.weight"]),
            local + "k_norm.bias": turned(state[at + "k_norm.bias"]),
            local + "linear_weights_proj.weight": state[at + "weights_proj.weight"],
        }

    def layer(self, layer: int, local: str) -> State:
        state, at = self.state, f"model.layers.{layer}."
        if linear(self.config, layer):
            found = self.linear_attention(at + "linear_attn.", local + "self_attention.")
        else:
            attention = self.latent_attention if "kv_lora_rank" in self.config else self.attention
            found = attention(at + "self_attn.", local + "self_attention.")
            found[local + "self_attention.linear_proj.weight"] = self.columns(state[at + "self_attn.o_proj.weight"])
        if at + "self_attn.o_proj.bias" in state:
            found[local + "self_attention.linear_proj.bias"] = state[at + "self_attn.o_proj.bias"]
        found[local + "input_layernorm.weight"] = state[at + "input_layernorm.weight"]
        found[local + "pre_mlp_layernorm.weight"] = state[at + "post_attention_layernorm.weight"]
        if sparse(self.config, layer):
            return found | self.experts(layer, local + "mlp.")
        return found | self.mlp(at + "mlp.", local + "mlp.", *self.place.tp)

    def predictor(self, number: int) -> State:
        layer, local = self.config["num_hidden_layers"] + number, f"mtp.layers.{number}."
        at = f"model.layers.{layer}."
        found = {local + f"{name}.weight": self.state[at + f"{name}.weight"] for name in ("enorm", "hnorm")}
        found[local + "eh_proj.weight"] = self.rows(self.state[at + "eh_proj.weight"])
        found[local + "final_layernorm.weight"] = self.state[at + "shared_head.norm.weight"]
        return found | self.layer(layer, local + "transformer_layer.")


def megatron_shard(
    config: Mapping[str, Any], state: State, place: Place, padded: int, *, engine: bool = False
) -> State:
    """What Megatron holds on one rank, by its names with global layer and expert numbers; stages are equal."""
    shard = Sharding(config, state, place, padded, engine)
    stage, stages = place.pp
    predictors = config.get("num_nextn_predict_layers", 0) if stage == stages - 1 else 0
    held: State = {}
    if stage == 0 or predictors:
        held["embedding.word_embeddings.weight"] = shard.vocabulary(state["model.embed_tokens.weight"])
    for layer in torch.arange(config["num_hidden_layers"]).chunk(stages)[stage].tolist():
        held |= shard.layer(layer, f"decoder.layers.{layer}.")
    for number in range(predictors):
        held |= shard.predictor(number)
    if stage == stages - 1:
        held["decoder.final_layernorm.weight"] = state["model.norm.weight"]
        if not config["tie_word_embeddings"]:
            held["output_layer.weight"] = shard.vocabulary(state["lm_head.weight"])
        elif stages > 1:
            held["output_layer.weight"] = shard.vocabulary(state["model.embed_tokens.weight"])
    return held


def legacy_names(held: State) -> State:
    """All experts of a layer in two weights, each `view(experts, inputs, outputs)` of it being theirs transposed."""
    joined = {name: tensor for name, tensor in held.items() if ".local_experts." not in name}
    for name in (name for name in held if ".local_experts." in name):
        layer, _, after = name.partition(".local_experts.")
        linear = after.split(".")[1]
        local = f"{layer}.weight{linear[-1]}"
        if local not in joined:
            experts = [held[other] for other in held if other.startswith(f"{layer}.local_") and linear in other]
            shape = (experts[0].shape[1], -1) if linear == "linear_fc1" else (-1, experts[0].shape[0])
            joined[local] = torch.stack([expert.T for expert in experts]).reshape(shape)
    return joined


def engine_names(held: State, *, grouped: bool) -> State:
    """The same under the names of Transformer Engine's layers."""
    renamed = {}
    for name, tensor in held.items():
        *before, module, kind = name.split(".")
        at = ".".join(before)
        if module == "input_layernorm" and f"{at}.self_attention.linear_qkv.weight" in held:
            name = f"{at}.self_attention.linear_qkv.layer_norm_weight"
        elif module == "input_layernorm" and f"{at}.self_attention.in_proj.weight" in held:
            name = f"{at}.self_attention.in_proj.layer_norm_weight"
        elif module in ("q_layernorm", "kv_layernorm") and f"{at}.linear_kv_up_proj.weight" in held:
            name = f"{at}.linear_{module.removesuffix('_layernorm')}_up_proj.layer_norm_weight"
        elif module == "pre_mlp_layernorm" and f"{at}.mlp.linear_fc1.weight" in held:
            name = f"{at}.mlp.linear_fc1.layer_norm_weight"
        elif grouped and "local_experts" in before:
            name = ".".join([*before[:-2], module, kind + before[-1]])
        renamed[name] = tensor
    return renamed
