"""Steps that reading the configs of several families has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.errors import NotSupportedError
from weft_vllm.attention import GroupedQuery
from weft_vllm.feed_forward import Dense, Experts
from weft_vllm.fields import Fields
from weft_vllm.model import Block, Layer, Model


def decoder(family: str, fields: Fields, layer: Callable[[int], Layer], **more: Any) -> Model:
    """What all families have in common; `layer` says what each of them is."""
    return Model(
        family=family,
        hidden=fields.size("hidden_size"),
        vocabulary=fields.size("vocab_size"),
        tied=fields.flag("tie_word_embeddings"),
        layers=tuple(layer(number) for number in range(fields.size("num_hidden_layers"))),
        **more,
    )


def dense_of(fields: Fields, **more: Any) -> Dense:
    """A feed-forward layer."""
    return Dense(fields.size("intermediate_size"), **more)


def layer_of(attention: Block, mlp: Block, name: str = "mlp") -> Layer:
    """Attention, and a feed-forward layer called `name`."""
    return Layer((("self_attn", attention), (name, mlp)))


def grouped_query(fields: Fields, head: int | None = None, **more: bool) -> GroupedQuery:
    """Attention as most configs describe it; `head` is the size of its heads where the config does not say it."""
    heads = fields.size("num_attention_heads")
    return GroupedQuery(
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", heads),
        head=fields.get("head_dim") or head or fields.size("hidden_size") // heads,
        **more,
    )


def sparse(fields: Fields, first: Callable[[int], tuple[str, Block]], experts: Experts) -> Callable[[int], Layer]:
    """Layers of Qwen's mixtures, by what is first in each of them."""
    dense = dense_of(fields)
    step, plain = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers", ())

    def layer(number: int) -> Layer:
        is_dense = number in plain or bool((number + 1) % step)
        return Layer((first(number), ("mlp", dense if is_dense else experts)))

    return layer


def untied(model: Model) -> Model:
    """A model of a family whose output layer vLLM never ties to the embedding."""
    if model.tied:
        raise NotSupportedError(f"{model.family} with tie_word_embeddings: vLLM has an output layer of its own for it")
    return model


def refuse(family: str, fields: Fields, *names: str) -> None:
    """Raise `NotSupportedError` when the config sets any of these."""
    found = [f"{name}={fields.get(name)!r}" for name in names if fields.flag(name)]
    if found:
        raise NotSupportedError(f"{family} with {', '.join(found)} is not mapped; start an engine and record it")
