"""Requests to a server that answers oddly, slowly, or not at all."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import NoneType
from typing import Any

import pytest

from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError, PeerLostError, WeftError
from weft_vllm import ServerError, server
from weft_vllm.server import VllmServer

from .http_server import FakeVllm, Handler, Odd

KEY = "sk-of-nobody"


def replying(status: int, data: bytes, length: int | None = None) -> Odd:
    return lambda handler: handler.reply(status, data, length)


def saying(data: bytes) -> Odd:
    """Bytes that are no HTTP, or no answer at all."""

    def say(handler: Handler) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return say


@pytest.mark.parametrize(
    ("odd", "error", "said"),
    [
        (replying(500, b'{"error": {"message": "worker 1: boom", "code": 500}}'), ServerError, "500: worker 1: boom"),
        (replying(500, b'{"error": "boom"}'), ServerError, "500: boom"),
        (replying(422, b'{"detail": [{"loc": "mode"}]}'), ServerError, r'422: \[\{"loc": "mode"\}\]'),
        (replying(502, b"<html>\xff"), ServerError, "502: <html>"),
        (replying(500, b""), ServerError, "500: nothing"),
        (replying(307, b""), ServerError, "307"),
        (replying(204, b""), ServerError, "204"),
        (replying(200, b"{"), ServerError, r"1 bytes that are not the JSON expected \(.*\): '\{'"),
        (replying(200, b'{"is_paused": "no"}'), ServerError, "str"),
        (replying(200, b"\xff\xfe"), ServerError, "not the JSON expected"),
        (replying(200, b"[" * 100_000), ServerError, "not the JSON expected"),
        (replying(200, b"x" * 2000), ServerError, "more than 1000 bytes"),
        (replying(200, b"{}", 900), PeerLostError, "IncompleteRead"),
        (saying(b"220 mail.example ESMTP\r\n"), ServerError, "something else than HTTP"),
        (saying(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200), PeerLostError, "got more than 100 headers"),
        (saying(b""), PeerLostError, "RemoteDisconnected"),
        (replying(401, b'{"error": "Unauthorized"}'), ConfigError, "401, which refuses the api_key that was given"),
        (replying(404, b'{"detail": "Not Found"}'), ConfigError, "no such route.*VLLM_SERVER_DEV_MODE=1"),
        (replying(405, b""), ConfigError, "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_odd_answers_are_named_and_nothing_is_asked_twice(
    odd: Odd, error: type[WeftError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_ANSWER_BYTES", 1000 if "1000" in said else server._ANSWER_BYTES)
    with FakeVllm() as fake:
        fake.odd["/pause"] = odd
        with pytest.raises(error, match=said) as found:
            VllmServer(fake.url, KEY).ask("POST", "/pause", dict[str, bool], 60.0, query={"mode": "abort"})
    assert f"POST {fake.url}/pause?mode=abort" in str(found.value)
    assert fake.calls == ["/pause"]


@pytest.mark.parametrize("protocol", ["1.0", "1.1"])
def test_a_server_that_answers_ever_so_slowly_has_a_deadline_for_all_of_it(protocol: str) -> None:
    ended = threading.Event()

    def trickle(handler: Handler) -> None:
        handler.wfile.write(f"HTTP/{protocol} 200 OK\r\nContent-Length: 1000000\r\n\r\n".encode())
        try:
            while not ended.wait(0.02):
                handler.wfile.write(b" ")
        except OSError:  # the connection is cut
            ended.set()
        handler.close_connection = True

    with FakeVllm() as fake:
        fake.odd["/resume"] = trickle
        with pytest.raises(DeadlineError, match=f"POST {fake.url}/resume: not within 0.2 s; late: the server at"):
            VllmServer(fake.url).ask("POST", "/resume", NoneType, 0.2)
        assert ended.wait(60), "the connection is still there"
    Deadline.after(60).wait(lambda: not any(t.name == "weft-http" for t in threading.enumerate()), "its end", list)


def test_no_time_left_is_a_deadline_that_nobody_hears_of() -> None:
    with FakeVllm() as fake:
        with pytest.raises(DeadlineError, match="/resume"):
            VllmServer(fake.url).ask("POST", "/resume", NoneType, 0.0)
        assert fake.calls == []


def test_a_server_that_is_not_there_is_lost() -> None:
    with socket.socket() as closed:  # bound, and not listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(PeerLostError, match=f"lost the server at {url}: GET {url}/version failed .*refused"):
            VllmServer(url).ask("GET", "/version", NoneType, 60.0)
    with pytest.raises(PeerLostError, match="gaierror"):
        VllmServer("http://no.such.name.invalid:8000").ask("GET", "/version", NoneType, 60.0)


def test_the_key_is_sent_and_never_shown() -> None:
    with FakeVllm() as fake:
        asked = VllmServer(fake.url, KEY)
        asked.ask("GET", "/version", NoneType, 60.0)
        assert fake.keys == {f"Bearer {KEY}"}
        for status in (401, 500):
            fake.odd["/version"] = replying(status, f'{{"error": "no such key: {KEY}"}}'.encode())
            with pytest.raises(WeftError, match="no such key: …") as found:
                asked.ask("GET", "/version", NoneType, 60.0)
            assert KEY not in str(found.value)
        fake.odd["/version"] = replying(200, KEY.encode())
        with pytest.raises(ServerError, match="…") as found:
            asked.ask("GET", "/version", dict[str, str], 60.0)
        assert KEY not in str(found.value)
        fake.odd["/version"] = replying(403, b"")
        with pytest.raises(ConfigError, match="refuses a request without api_key"):
            VllmServer(fake.url).ask("GET", "/version", NoneType, 60.0)
    assert KEY not in repr(asked)


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("ftp://u:p4ss@host/x?y=1", "k\n3y", ["api_key", "leave out what follows", "expected http://", "white space"]),
        ("localhost:8000", None, ["expected http://HOST:PORT"]),
        ("http://", None, ["expected http://HOST:PORT"]),
        ("http://host:p4ss", None, ["not a URL"]),
        ("http://host:99999", None, ["not a URL"]),
    ],
)
def test_everything_that_is_wrong_with_an_address_is_said_at_once(url: str, key: str | None, said: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        VllmServer(url, key)
    for words in said:
        assert words in str(found.value)
    assert "p4ss" not in str(found.value)
    assert "3y" not in str(found.value)


def test_a_path_of_the_server_comes_before_its_routes() -> None:
    with FakeVllm() as fake:
        fake.odd["/behind/it/version"] = replying(200, b'{"version": "0.32.0"}')
        asked = VllmServer(f"{fake.url}/behind/it/")
        assert asked.ask("GET", "/version", dict[str, str], 60.0) == {"version": "0.32.0"}
        assert asked.url == f"{fake.url}/behind/it"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_with_a_certificate_of_ones_own_and_without(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that does not trust the certificate hangs up."""

    class Tls(BaseHTTPRequestHandler):
        def setup(self) -> None:
            self.request = context.wrap_socket(self.request, server_side=True)
            super().setup()

        def finish(self) -> None:
            super().finish()
            self.request.close()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    serving = Quiet(("127.0.0.1", 0), Tls)
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    try:
        url = f"https://127.0.0.1:{serving.server_port}"
        trusting = ssl.create_default_context(cafile=str(certificate))
        assert VllmServer(url, tls=trusting).ask("GET", "/version", dict[str, str], 60.0) == {}
        with pytest.raises(ConfigError, match=r"no TLS with this server .*give tls="):
            VllmServer(url).ask("GET", "/version", NoneType, 60.0)
    finally:
        serving.shutdown()
        thread.join(60)
        serving.server_close()
    with FakeVllm() as plain, pytest.raises(ConfigError, match="or an http:// URL"):
        VllmServer(plain.url.replace("http:", "https:")).ask("GET", "/version", NoneType, 60.0)
