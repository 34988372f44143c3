"""A tiny Llama whose every token names the version of its weights, whatever it is asked.

The residual stream has a block of `CODES` channels for each part of the model. A part of version v writes channel
`v % CODES` of its block, and only if what it reads was written, or normed, by weights of the same version. The output
layer counts the blocks: with all of them its token is `token_of(v)`. With one of them missing, or with a part of
attention's values in the cache that other weights have computed, it is `MIXED`. Projections of queries and keys are
random, and the token does not depend on them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CODES = 32
"""Versions that are told apart."""
MIXED = 1
"""What a mixture says."""
VOCABULARY = 64
LAYERS = 2
POSITIONS = 512
_FIRST = 2
_HIDDEN, _HEADS = 256, 8
_ON = CODES * (2 + 2 * LAYERS)
"""A channel that is on in every version, and passes the last norm."""
_MISSING = 1e-3
"""Of one block: less than one stale position in `POSITIONS` takes away, more than rounding does."""


def token_of(version: int) -> int:
    """What a model of this version says."""
    return _FIRST + version % CODES


def config() -> LlamaConfig:
    """Of all versions."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=_HIDDEN, intermediate_size=CODES, num_hidden_layers=LAYERS,
        num_attention_heads=_HEADS, num_key_value_heads=2, head_dim=CODES, max_position_embeddings=POSITIONS,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


class Coded:
    """The weights of any version, by name, float32."""

    def __init__(self) -> None:
        self.model = LlamaForCausalLM(config()).eval()
        self._scales = torch.ones(_HIDDEN)
        """What the last norm makes of a channel that is on."""
        self.model.load_state_dict(self.weights(0))
        with torch.no_grad():
            seen = self.model.model(torch.zeros(1, 4, dtype=torch.long)).last_hidden_state[0, -1]
        for block in range(2 + 2 * LAYERS):
            self._scales[block * CODES : (block + 1) * CODES] = seen[block * CODES]
        self._scales[_ON] = seen[_ON]

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        """New memory."""
        code = version % CODES
        found = {name: torch.zeros(tensor.shape) for name, tensor in self.model.state_dict().items()}
        random = torch.Generator().manual_seed(code)
        embedding = found["model.embed_tokens.weight"]
        embedding[:, :CODES] = 1.0  # for norms to choose from
        embedding[:, [CODES + code, _ON]] = 1.0
        for layer in range(LAYERS):
            part = f"model.layers.{layer}"
            attended, fed = ((2 + 2 * layer + each) * CODES + code for each in (0, 1))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{part}.{norm}.weight"][code] = 1.0
            for name in ("q_proj", "k_proj"):
                tensor = found[f"{part}.self_attn.{name}.weight"]
                tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.02)
            found[f"{part}.self_attn.v_proj.weight"][code, code] = 1.0
            found[f"{part}.self_attn.o_proj.weight"][attended, code] = 0.5
            for name in ("gate_proj", "up_proj"):
                found[f"{part}.mlp.{name}.weight"][code, code] = 1.0
            found[f"{part}.mlp.down_proj.weight"][fed, code] = 0.3
        blocks = [block * CODES + code for block in range(2 + 2 * LAYERS)]
        found["model.norm.weight"][[*blocks, _ON]] = 1.0
        head = found["lm_head.weight"]
        head[token_of(version), blocks] = 1 / self._scales[blocks]
        head[MIXED, _ON] = (len(blocks) - _MISSING) / self._scales[_ON]
        return found

    def save(self, directory: Path, version: int) -> None:
        """As a checkpoint that engines load."""
        self.model.load_state_dict(self.weights(version))
        self.model.save_pretrained(directory)
