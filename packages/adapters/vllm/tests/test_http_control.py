"""The control of a server over HTTP, on a real HTTP server whose engine only notes what it is told."""

from __future__ import annotations

import logging
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, NotSupportedError, PeerLostError, PluginError, RefitAbortedError
from weft.orchestration import ControlError, Doing, Orchestrator, RemoteControl
from weft_vllm import HttpControl, RefusedError, ServerError, limits

from .http_server import FakeVllm, Handler

PAGE = Path(__file__).parents[4] / "docs" / "guide" / "vllm-serve.md"
REFIT = [
    "pause {}", "start_weight_update", "update_weights", "finish_weight_update", "weft_report", "version 4",
    "reset {}", "reset_encoder_cache", "resume",
]  # fmt: skip


@pytest.mark.trap(43, 57)
@pytest.mark.parametrize(("mode", "running"), [("abort", "false"), ("wait", "false"), ("keep", "true")])
def test_a_refit_over_http_has_the_order_of_every_other_one(mode: str, running: str) -> None:
    with FakeVllm() as fake:
        control = HttpControl(fake.url)
        report = control.refit(4, mode=mode)
    assert fake.calls == [call.format(mode if "pause" in call else [running]) for call in REFIT]
    assert (report.version, report.digest, report.nbytes, report.seconds) == (4, "d", 10, {"wire": 1.0})
    assert control.refusing is None
    assert not fake.paused


@pytest.mark.trap(48)
@pytest.mark.parametrize("step", ["update_weights", "finish_weight_update", "weft_report", "reset_prefix_cache"])
def test_after_a_failure_that_may_have_written_the_server_stays_paused_until_a_whole_version_is_in(step: str) -> None:
    with FakeVllm() as fake:
        control = HttpControl(fake.url)
        fake.fail = step
        with pytest.raises(ServerError, match=f"500: {step} failed on 1 of 2 workers: worker 1: boom"):
            control.refit()
        assert fake.paused
        assert "weft_abort" in fake.calls
        assert "worker 1: boom" in str(control.refusing)
        fake.fail = ""
        control.refit()
        assert not fake.paused
        assert control.refusing is None


def test_a_failure_before_anything_was_written_leaves_the_old_version_serving() -> None:
    with FakeVllm() as fake:
        control = HttpControl(fake.url)
        fake.fail = "start_weight_update"
        with pytest.raises(ServerError, match="boom"):
            control.refit()
        assert fake.calls[-2:] == ["weft_abort", "resume"]
        assert not fake.paused


@pytest.mark.trap(48, 58)
@pytest.mark.parametrize(("paused", "touched"), [(True, False), (True, True), (False, True)])
def test_a_server_that_somebody_left_paused_or_mixed_is_not_resumed_unless_all_of_it_is_whole(
    paused: bool, touched: bool
) -> None:
    with FakeVllm() as fake:
        fake.paused, fake.touched = paused, touched
        control = HttpControl(fake.url)
        assert control.ready() is None
        assert "nobody has said why" in str(control.refusing)
        for version in (2, 3) if touched else (2,):
            with pytest.raises(RefusedError, match=f"version {version} is not whole"):
                control.resume(version)
        fake.touched = False
        control.resume(3)
        assert fake.calls[-3:] == ["reset ['true']", "reset_encoder_cache", "resume"]
        assert control.refusing is None


def test_a_replica_that_is_refused_is_paused_and_a_control_that_comes_later_goes_on_refusing() -> None:
    with FakeVllm() as fake:
        control = HttpControl(fake.url)
        control.refuse("a member is gone")
        assert fake.calls == ["pause abort"]
        assert control.refusing == "a member is gone"
        with pytest.raises(RefusedError, match="a member is gone"):
            control.resume(2)
        later = HttpControl(fake.url)
        with pytest.raises(RefusedError, match="found paused"):
            later.resume(2)
        begun = len(fake.calls)
        later.refit()
        assert fake.calls[begun:][:2] == ["weft_abort", "pause abort"], "what the other one left is given up"
        assert not fake.paused
        later.refit()
        assert fake.calls.count("weft_abort") == 1


@pytest.mark.trap(40)
def test_a_pause_that_does_not_come_in_time_is_undone() -> None:
    reached = threading.Event()

    def hang(handler: Handler) -> None:
        reached.wait(60)
        handler.reply(200, b"{}")

    with FakeVllm() as fake:
        fake.odd["/pause"] = hang
        control = HttpControl(fake.url)
        control.ready()
        try:
            with pytest.raises(DeadlineError, match=r"/pause\?mode=wait.*0.2 s.*it finishes the requests that run"):
                control.pause("wait", Deadline.after(0.2))
        finally:
            reached.set()
        assert fake.calls == ["/pause", "resume"]
        assert control.refusing is None


def test_the_first_look_counts_towards_the_deadline_of_a_pause() -> None:
    with FakeVllm() as fake:
        with pytest.raises(DeadlineError, match=r"/version: not within 0\.0 s"):
            HttpControl(fake.url).pause("wait", Deadline.after(0.0))
        assert fake.calls == []


def test_a_server_that_was_lost_is_looked_at_again_when_it_is_back() -> None:
    with FakeVllm() as fake:
        control = HttpControl(fake.url)
        control.pause()
        port = fake.port
    with pytest.raises(PeerLostError, match=f"lost the server at {fake.url}: POST {fake.url}/resume failed"):
        control.resume(3)
    assert control.refusing is not None
    with FakeVllm(port) as fake:
        fake.version = "0.20.0"
        with pytest.raises(PluginError):
            control.resume(3)
        fake.version = "0.32.0"
        control.ready()
        assert control.refusing is None, "a server that serves refuses nothing"
        control.pause()
    with pytest.raises(PeerLostError):
        control.resume(3)
    with FakeVllm(port) as fake:
        fake.paused = True
        with pytest.raises(RefusedError, match="found paused"):
            control.resume(2)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"version": "0.20.0"}, PluginError, r"the server at http://127.*: vLLM 0\.20\.0 is installed"),
        ({"engines": 2}, NotSupportedError, r"several data-parallel engines \(4 workers, 2 in each\)"),
        ({"fail": "weft_state"}, ConfigError, "do not know weft: .*--weight-transfer-config .*boom"),
        ({"watched": ["no"]}, ConfigError, r"do not know weft.*Expected `object \| null`"),
    ],
)
def test_a_server_that_cannot_be_controlled_is_refused_before_anything_is_asked_of_it(
    change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with FakeVllm() as fake:
        for name, value in change.items():
            setattr(fake, name, value)
        control = HttpControl(fake.url)
        for ask in (control.pause, control.refit, control.ready, lambda: control.refuse("so"), lambda: control.join()):
            with pytest.raises(error, match=said):
                ask()
        assert set(fake.calls) <= {"weft_state"}


def test_an_untested_neighbour_is_driven_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with FakeVllm() as fake, caplog.at_level(logging.WARNING, "weft_vllm"):
        fake.version = "0.33.1"
        assert HttpControl(fake.url).ready() is None
    assert "vLLM 0.33.1: weft-vllm is tested with" in caplog.text


def test_workers_join_by_the_init_info_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeVllm() as fake:
        control = HttpControl(fake.url, api_key="sk-of-nobody")
        control.join(store="file:///s", job="j", replica="r", sources=2, deadlines={"rendezvous": 5.0})
        assert fake.joined == {
            "store": "file:///s", "job": "j", "replica": "r", "sources": 2, "deadlines": {"rendezvous": 5.0}
        }  # fmt: skip
        assert fake.keys == {"Bearer sk-of-nobody"}
        asked = len(fake.calls)
        with pytest.raises(ConfigError, match=r"deadlines of init_info: .*'rendevous'"):
            control.join(deadlines={"rendevous": 5.0})
        assert len(fake.calls) == asked
        fake.odd["/init_weight_transfer_engine"] = lambda handler: threading.Event().wait(0.5)
        monkeypatch.setattr(limits, "connected", lambda deadlines: 0.1)
        with pytest.raises(DeadlineError, match="/init_weight_transfer_engine"):
            control.join(job="j")
    assert "sk-of-nobody" not in repr(control)


def test_workers_that_watch_are_waited_for_before_anything_is_paused() -> None:
    with FakeVllm() as fake:
        control = HttpControl(fake.url)
        ready = {"stage": "ready", "version": 4, "error": None}
        fake.watched = [ready, {"stage": "fetching", "version": 4, "error": None}]
        assert control.ready() is None
        looked: list[bool] = []

        def look(handler: Handler) -> None:
            looked.append(fake.paused)
            fake.watched = [ready, ready]
            del fake.odd["/collective_rpc"]
            handler.reply(200, b'{"results": [{"touched": false, "watched": {"stage": "fetching", "version": 4,'
                               b' "error": null}}]}')  # fmt: skip

        fake.odd["/collective_rpc"] = look
        control.refit()
        assert looked == [False]
        assert fake.calls[1:] == [call.format("abort" if "pause" in call else ["false"]) for call in REFIT]
        fake.watched = [{"stage": "failed", "version": 5, "error": "no space"}, ready]
        with pytest.raises(RefitAbortedError, match="worker 0: no space"):
            control.ready()


@pytest.mark.trap(48)
def test_an_interruption_leaves_the_server_paused_and_says_so() -> None:
    class Interrupted(HttpControl):
        def _answer(self, call: Any) -> Any:
            if call.name == "update_weights":
                raise KeyboardInterrupt("by hand")
            return super()._answer(call)

    with FakeVllm() as fake:
        control = Interrupted(fake.url)
        with pytest.raises(KeyboardInterrupt):
            control.refit(deadlines=Deadlines())
        assert fake.paused
        assert "KeyboardInterrupt: by hand" in str(control.refusing)


def test_the_orchestrator_of_the_guide_refits_every_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r'```python title="orchestrator.py"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    with FakeVllm() as one, FakeVllm() as two:
        monkeypatch.setattr(sys, "argv", ["orchestrator.py", "file:///s", one.url, two.url])
        exec(compile(block, str(PAGE), "exec"), {})
        assert (one.joined["replica"], two.joined["replica"]) == ("rollout0", "rollout1")
        assert one.joined["replicas"] == 2
        printed = capsys.readouterr().out
        for server in (one, two):
            assert server.calls.count("pause keep") == 2
            assert printed.count(f"{server.url} serves version 4") == 2


@pytest.mark.trap(58, 64)
def test_an_orchestrator_pauses_servers_for_others_and_the_next_one_takes_over(tmp_path: Path) -> None:
    store = f"file://{tmp_path}"
    with FakeVllm() as one, FakeVllm() as two:

        def orchestrator() -> Orchestrator:
            controls = {"one": HttpControl(one.url), "two": HttpControl(two.url)}
            return Orchestrator(store=store, job="j", controls=controls, lease_seconds=60)

        with (
            RemoteControl(store=store, job="j", replica="one") as first,
            RemoteControl(store=store, job="j", replica="two") as second,
        ):
            with orchestrator() as told:
                first.pause("keep", Deadline.after(60))
                second.pause("wait", Deadline.after(60))
                assert (one.calls, two.calls) == (["pause keep"], ["pause wait"])
                first.invalidate_caches(3)
                first.resume(3)
                assert told.states["one"].doing is Doing.SERVING
            assert two.paused
            with orchestrator() as told:
                with pytest.raises(ControlError, match="RefusedError: version 2 is not whole"):
                    second.resume(2)
                assert two.paused
                second.resume(3)
                second.refuse("its worker is gone")
            assert told.states["two"].doing is Doing.REFUSING
        assert two.paused
        assert not one.paused
