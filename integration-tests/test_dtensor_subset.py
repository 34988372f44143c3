"""Refits of a part of real models: frozen towers, merged adapters, some experts. What does not move keeps its bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import tiny
from support.transported import Over
from transformers import PreTrainedModel

import weft
from weft import Refit, serve_store
from weft.testing.job import Part, all_succeeded
from weft.testing.members import POISON, poison
from weft_dtensor import ModuleSource, ModuleTarget

MERGED = "model.layers.0.self_attn.q_proj.weight"


@contextmanager
def merged_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Adapters of rank 2 on queries and values, merged into them for as long as this lasts, as trainers do."""
    adapted = [weight for name, weight in model.named_parameters() if re.search(r"\.[qv]_proj\.weight$", name)]
    deltas = [torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]) for weight in adapted]
    with torch.no_grad():
        for weight, delta in zip(adapted, deltas, strict=True):
            weight += delta
        yield
        for weight, delta in zip(adapted, deltas, strict=True):
            weight -= delta


def saved(model: PreTrainedModel, path: Path) -> dict[str, torch.Tensor]:
    """Its tensors by their names on disk, as Transformers writes them."""
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


@pytest.mark.trap(12, 13, 71)
@pytest.mark.parametrize("transport", ["local", "gloo"])
@pytest.mark.parametrize(
    ("family", "only", "moved"),
    [
        ("qwen2_5_vl", ("model.*", "lm_head.weight"), r"(?!visual\.).*"),
        ("qwen3_moe", ("*.q_proj.weight", "*.v_proj.weight"), r".*self_attn\.[qv]_proj\.weight"),
        ("qwen3_moe", ("*.experts.[02].*",), r".*\.experts\.(0|2)\..*"),  # inside of what Transformers holds fused
    ],
    ids=["all but the tower", "merged adapters", "some experts"],
)
def test_a_named_part_moves_and_all_else_keeps_its_bytes(
    family: str, only: tuple[str, ...], moved: str, transport: str, tmp_path: Path
) -> None:
    trained, served = tiny(family), tiny(family)
    for tensor in trained.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))
    poison([tensor.view(-1) for tensor in served.state_dict().values()])
    sent: dict[str, torch.Tensor] = {}

    def send(refit: Refit) -> int:
        with merged_adapters(trained):
            sent.update(saved(trained, tmp_path / "sent"))
            offer = refit.offer(1)
            offer.released()
        return offer.committed().bytes

    parts = [
        Part("trained", send, source=ModuleSource(trained)),
        Part("served", lambda refit: refit.receive(1).bytes, target=ModuleTarget(served), replica="served"),
    ]
    server = serve_store()
    job = Over(server.url, weft.Expect(sources=1, replicas=1), weft.Policy(only=only), transport=transport)
    try:
        results = job.run(parts)
    finally:
        server.close()
    all_succeeded(results)
    assert not torch.equal(sent[MERGED], saved(trained, tmp_path / "trained")[MERGED])
    found = saved(served, tmp_path / "found")
    wanted = {name for name in sent if re.fullmatch(moved, name)}
    assert 0 < len(wanted) < len(found) == len(sent)
    assert results["trained"] == results["served"] == sum(sent[name].nbytes for name in wanted)
    for name, tensor in found.items():
        raw = tensor.view(torch.uint8)
        expected = sent[name].view(torch.uint8) if name in wanted else torch.full_like(raw, POISON)
        assert torch.equal(raw, expected), name
