"""A real HTTP server with the routes of vLLM's that the control asks, and one engine of two workers behind them."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Odd = Callable[["Handler"], None]


class Listening(ThreadingHTTPServer):
    """Clients that have hung up meanwhile are no error of the test's."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class FakeVllm:
    """Use as a context manager. `fail` names what fails, on worker 1; `odd` answers a route in its own way."""

    def __init__(self, port: int = 0) -> None:
        self.calls: list[str] = []
        """Routes that do something, with what matters of their arguments; for `collective_rpc` the method."""
        self.keys: set[str | None] = set()
        self.odd: dict[str, Odd] = {}
        self.fail = ""
        self.version = "0.32.0"
        self.engines = 1
        self.paused, self.touched = False, False
        self.versions: list[int | None] = [3, 3]
        self.watched: list[dict[str, Any] | None] = [None, None]
        self.joined: dict[str, Any] = {}
        self._server = Listening(("127.0.0.1", port), type("Bound", (Handler,), {"fake": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeVllm:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(60)
        self._server.server_close()

    def answer(self, route: str, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        name = body.get("method", route.removeprefix("/"))
        forgets = "" if query.get("clear_cache") == "false" else " and forget"
        said = {"pause": f"pause {query.get('mode')}{forgets}", "reset_prefix_cache": f"reset {[*query.values()]}"}
        said["update_weight_version"] = f"version {body.get('new_version')}"
        if route not in ("/version", "/is_paused", "/get_world_size") and name != "weft_state":
            self.calls.append(said.get(name, name))
        if name == self.fail:
            return 500, {"error": {"message": f"{name} failed on 1 of 2 workers: worker 1: boom", "code": 500}}
        match name:
            case "version":
                return 200, {"version": self.version}
            case "is_paused":
                return 200, {"is_paused": self.paused}
            case "get_world_size":
                return 200, {"world_size": 2 * (1 if query.get("include_dp") == "false" else self.engines)}
            case "pause":
                self.paused = True
                return 200, {"status": "paused"}
            case "resume":
                self.paused = False
                return 200, {"status": "resumed"}
            case "weft_state":
                return 200, {"results": [{"touched": self.touched, "watched": watched} for watched in self.watched]}
            case "weft_report":
                refit = {"digest": "d", "bytes": 5, "seconds": {"wire": 1.0}}
                return 200, {"results": [{"version": version, "refit": refit} for version in self.versions]}
            case "weft_abort":
                return 200, {"results": [None, None]}
            case "start_weight_update":
                self.touched = True
            case "finish_weight_update":
                self.touched, self.versions = False, [4, 4]
            case "reset_prefix_cache":
                return 200, {"success": True}
            case "init_weight_transfer_engine":
                self.joined = body["init_info"]
        return 200, {"message": "done"}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    fake: FakeVllm
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        self.fake.keys.add(self.headers.get("Authorization"))
        if parts.path in self.fake.odd:
            self.fake.calls.append(parts.path)
            self.fake.odd[parts.path](self)
            return
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        status, found = self.fake.answer(parts.path, query, json.loads(data) if data else {})
        self.reply(status, json.dumps(found).encode())

    def reply(self, status: int, data: bytes, length: int | None = None) -> None:
        """Send an answer, which may claim another length than it has."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = length is not None

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
