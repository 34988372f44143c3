"""Checkpoints as sources: shares of ranks, ties, and files that are not what they should be."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.errors import ConfigError, LayoutError
from weft_dtensor import CheckpointSource
from weft_dtensor.headers import StoredTensor, read_checkpoint

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}


def write(file: Path, tensors: Mapping[str, torch.Tensor], pad: bool = True, **spoiled: Any) -> None:
    """A safetensors file, by the format's description; `spoiled` replaces header entries."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header | spoiled).encode()
    text += b" " * (-len(text) % 8 if pad else 1 - len(text) % 2)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(9, 4, dtype=torch.float32),
        "model.layers.0.up.weight": torch.randn(5, 4).to(torch.bfloat16),
        "model.layers.0.count": torch.tensor(7),
        "model.layers.0.nothing": torch.zeros(0, 4),
        "model.norm.weight": torch.randn(4).to(torch.bfloat16),
    }


def sharded(path: Path, tensors: Mapping[str, torch.Tensor], files: int = 2) -> dict[str, str]:
    """Spread tensors over files, with an index."""
    placed = {name: f"model-{n % files + 1:05}-of-{files:05}.safetensors" for n, name in enumerate(tensors)}
    for file in sorted(set(placed.values())):
        write(path / file, {name: tensor for name, tensor in tensors.items() if placed[name] == file})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


def check(source: CheckpointSource, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Every buffer against its tensor; the names this rank holds."""
    found = source.memory()
    for piece in source.layout():
        assert piece.box.numel == tensors[piece.tensor].numel()
        assert torch.equal(found[piece.buffer], tensors[piece.tensor].view(-1))
    return set(found)


def test_one_file_holds_everything(tmp_path: Path) -> None:
    tensors = weights()
    write(tmp_path / "model.safetensors", tensors)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        source = CheckpointSource(path)
        assert check(source, tensors) == tensors.keys() - {"model.layers.0.nothing"}
        shapes = {tensor.name: tensor.shape for tensor in source.layout().tensors}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert source.copied_bytes == 0


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_whole_tensors_by_bytes(tmp_path: Path, world: int) -> None:
    tensors = {f"layers.{n}.weight": torch.randn(8 + n % 3, 16) for n in range(20)}
    sharded(tmp_path, tensors, files=3)
    held = [check(CheckpointSource(tmp_path, rank, world), tensors) for rank in range(world)]
    assert sorted(name for names in held for name in names) == sorted(tensors)
    loads = [sum(tensors[name].nbytes for name in names) for names in held]
    assert max(loads) - min(loads) <= 2 * max(tensor.nbytes for tensor in tensors.values())


def test_one_mapping_per_file_and_rank(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.weight": torch.randn(64, 64) for n in range(8)}
    sharded(tmp_path, tensors)
    memory = CheckpointSource(tmp_path, 1, 2).memory()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in memory.values()}
    assert len(storages) == 1
    assert sum(storages.values()) < sum(tensor.nbytes for tensor in memory.values()) + 16384


def test_memory_is_private_and_what_lies_askew_is_copied_and_counted(tmp_path: Path) -> None:
    tensors = {"bytes": torch.arange(3, dtype=torch.uint8), "weight": torch.randn(4, 4)}
    write(tmp_path / "model.safetensors", tensors)
    before = (tmp_path / "model.safetensors").read_bytes()
    source = CheckpointSource(tmp_path)
    check(source, tensors)
    assert source.copied_bytes == 64
    source.memory()["bytes"].fill_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.trap(13)
@pytest.mark.parametrize("head", ["absent", "equal", "different"])
@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_tied_as_the_config_says_unless_the_file_differs(tmp_path: Path, head: str, tied: bool) -> None:
    tensors = weights()
    if head != "absent":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (head == "different")
    sharded(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    for rank in range(2):
        layout = CheckpointSource(tmp_path, rank, 2).layout()
        ties = [(tie.alias, tie.name) for tie in layout.ties]
        expected = [("lm_head.weight", "model.embed_tokens.weight")] if tied and head != "different" else []
        assert ties == expected
        if expected:
            assert "lm_head.weight" not in {tensor.name for tensor in layout.tensors}


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", weights())
    source = CheckpointSource(tmp_path)
    source.hold(1).release()
    write(tmp_path / "other", weights() | {"more": torch.zeros(2)})
    (tmp_path / "other").rename(tmp_path / "model.safetensors")
    with pytest.raises(LayoutError, match=r"model\.safetensors: changed since it was mapped"):
        source.hold(2)


def test_a_file_that_changes_behind_its_header_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.safetensors", weights())
    write(tmp_path / "other", weights() | {"more": torch.zeros(2)})

    def replaced(path: Path) -> list[StoredTensor]:
        stored = read_checkpoint(path)
        (tmp_path / "other").rename(tmp_path / "model.safetensors")
        return stored

    monkeypatch.setattr("weft_dtensor.checkpoint.read_checkpoint", replaced)
    with pytest.raises(LayoutError, match=r"model\.safetensors: changed since it was mapped"):
        CheckpointSource(tmp_path).hold(1)


def faults(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        CheckpointSource(path)
    return str(caught.value)


def test_all_faults_of_sharded_files_are_named_at_once(tmp_path: Path) -> None:
    placed = sharded(tmp_path, weights(), files=5)
    names = list(placed)
    (tmp_path / placed[names[0]]).unlink()
    whole = (tmp_path / placed[names[1]]).read_bytes()
    (tmp_path / placed[names[1]]).write_bytes(whole[:-3])
    (tmp_path / placed[names[2]]).write_bytes(b"\xff" * 40)
    moved = placed | {names[4]: placed[names[3]]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    text = faults(tmp_path)
    for part in (
        f"{placed[names[0]]}: missing",
        f"tensor {names[1]} ends at byte {len(whole)} of a file of {len(whole) - 3}: the file is cut short",
        f"{placed[names[2]]}: not a safetensors file",
        f"tensor {names[4]} should be in {placed[names[3]]}, it is in no file",
    ):
        assert part in text


def test_a_tensor_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    placed = sharded(tmp_path, weights())
    del placed["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert "tensor model.norm.weight is not in model.safetensors.index.json" in faults(tmp_path)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}, "has dtype F4"),
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}, "16 bytes, but lies at bytes 0:12"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "but lies at bytes 4:0"),
        ({"dtype": "F32", "shape": "much"}, "without dtype, shape and data_offsets"),
    ],
)
def test_a_bad_header_entry_is_named(tmp_path: Path, entry: Any, part: str) -> None:
    write(tmp_path / "model.safetensors", weights(), bad=entry)
    text = faults(tmp_path)
    assert "model.safetensors: tensor bad" in text
    assert part in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not a safetensors file"),
        (struct.pack("<Q", 9) + b"{not json", "header is not JSON"),
        (struct.pack("<Q", 2) + b"[]", "header is not an object"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        (np.full(64, 255, np.uint8).tobytes(), "not a safetensors file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    text = faults(tmp_path)
    assert part in text
    assert str(tmp_path) in text


def test_bad_arguments_say_what_was_expected(tmp_path: Path) -> None:
    assert "expected a safetensors file, or a directory" in faults(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "expected a weight_map" in faults(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "not JSON" in faults(tmp_path)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        CheckpointSource(tmp_path, 2, 2)
