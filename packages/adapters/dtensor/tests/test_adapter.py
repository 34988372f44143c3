"""The analytic side, as far as it needs no Transformers; layouts are compared with live ones in `integration-tests`."""

from __future__ import annotations

import sys

import pytest

from weft.contracts import Adapter
from weft.errors import ConfigError, PluginError
from weft_dtensor import adapter
from weft_dtensor.mesh import Mesh, Place


def test_sizes_multiply_and_form_one_replica() -> None:
    typed: Adapter = adapter
    assert typed.world_size({}) == 1
    assert typed.world_size({"fsdp": 4, "replicate": 2}) == 8
    assert typed.world_size({"fsdp": 4, "tp": 3, "ep": 6}) == 12
    assert typed.replicas({"fsdp": 4, "replicate": 2}) == 1


@pytest.mark.trap(17)
def test_sizes_that_do_not_fit_are_named_together() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown axis 'pp', expected replicate, fsdp, tp, ep; fsdp=0, expected at least 1"
    ):
        adapter.world_size({"pp": 2, "fsdp": 0})


@pytest.mark.trap(17)
@pytest.mark.parametrize(
    ("sizes", "fitting"),
    [({"fsdp": 4, "ep": 3}, "1 or 2 or 4"), ({"fsdp": 3, "tp": 2, "ep": 3}, "2 or 6"), ({"tp": 4, "ep": 2}, "4")],
)
def test_an_expert_mesh_that_does_not_factor_is_named_with_its_numbers(sizes: dict[str, int], fitting: str) -> None:
    fsdp, tp = sizes.get("fsdp", 1), sizes.get("tp", 1)
    with pytest.raises(ConfigError) as caught:
        adapter.world_size(sizes)
    text = str(caught.value)
    assert f"ep={sizes['ep']} does not factor with fsdp={fsdp} and tp={tp}" in text
    assert f"fsdp·tp = {fsdp * tp}" in text
    assert text.endswith(f"ep={fitting}")


@pytest.mark.trap(2)
def test_every_rank_has_a_place_of_its_own_in_both_meshes() -> None:
    mesh = Mesh.read({"replicate": 2, "fsdp": 3, "tp": 2, "ep": 2})
    places = [mesh.place(rank) for rank in range(mesh.world)]
    assert places[:6] == places[6:]
    for pair in ("fsdp", "tp"), ("expert_fsdp", "ep"):
        assert len({tuple(getattr(place, axis) for axis in pair) for place in places}) == 6
    assert [place.tp for place in places[:4]] == [0, 1, 0, 1]
    assert Mesh.read({"fsdp": 2, "tp": 2, "ep": 4}).place(2) == Place(fsdp=1, tp=0, expert_fsdp=0, ep=2)


def test_missing_transformers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PluginError, match=r"pip install 'weft-dtensor\[transformers\]'"):
        adapter.layouts({"model_type": "qwen3"}, {"fsdp": 2}, "bfloat16")
