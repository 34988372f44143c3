"""The routes of a vLLM server: one request at a time, each by a deadline, with errors that say what to do.

Over the standard library's `http.client`: an orchestrator then needs neither vLLM nor anything else beside weft. Each
request has a connection of its own, so that none is found dead; no request is sent twice, no redirect is followed, and
the environment's proxies are not asked.
"""

from __future__ import annotations

import json
import queue
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.client import (
    BadStatusLine,
    HTTPConnection,
    HTTPException,
    HTTPSConnection,
    IncompleteRead,
    RemoteDisconnected,
)
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlencode, urlsplit

import msgspec

from weft.errors import ConfigError, DeadlineError, PeerLostError, WeftError

_ANSWER_BYTES = 1 << 26
"""A longer answer is none, as with records of the store."""
_WORDS_CHARACTERS = 20_000
"""Of what a server says, in an error: enough for the words of many workers."""

Answer = TypeVar("Answer")


class ServerError(WeftError):
    """A vLLM server has failed at what it was asked, or has answered something else; the message has its words."""


class VllmServer:
    """Where a vLLM server is, and the key that it, or a gateway before it, asks for. For any thread."""

    def __init__(self, url: str, api_key: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        """Raises `ConfigError` with everything that is wrong with the URL and the key; connects to nobody."""
        parts, faults = _parts(url)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            faults.append("api_key (not shown) has white space at its ends, or what no HTTP header can carry")
        if faults:
            raise ConfigError(f"the address of a vLLM server: {'; '.join(faults)}")
        self.url = parts.geturl().rstrip("/")
        self._parts, self._key, self._tls = parts, api_key, tls

    def __repr__(self) -> str:
        return f"VllmServer({self.url!r})"

    def ask(
        self, verb: str, route: str, kind: type[Answer], seconds: float, *,
        body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None,
    ) -> Answer:  # fmt: skip
        """Send one request, and give its answer: JSON of this kind, or None for `NoneType`, whatever came.

        Raises `DeadlineError` when the whole answer has not come within `seconds`: the server may yet do what it was
        asked; `PeerLostError` when there is no server, or it went away; `ConfigError` where it has no such route or
        does not accept the key; `ServerError` for every other answer.
        """
        target = route + (f"?{urlencode(query)}" if query else "")
        what = f"{verb} {self.url}{target}"
        status, data = self._exchanged(verb, target, what, seconds, body)
        if status != 200:
            raise self._failure(status, what, data)
        if kind is type(None):
            return None
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ServerError(
                f"{what} was answered with {len(data)} bytes that are not the JSON expected ({error}): "
                f"{self._words(data)!r}; is this a vLLM server?"
            ) from error

    def _exchanged(
        self, verb: str, target: str, what: str, seconds: float, body: Mapping[str, Any] | None
    ) -> tuple[int, bytes]:
        """Status and body of the answer. In a thread of its own: sockets have a limit for each read, and names none."""
        if seconds <= 0:
            raise self._slow(what, seconds)
        exchange = _Exchange(self._connection(seconds))
        headers = {"Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        try:
            found = exchange.answer((verb, self._parts.path.rstrip("/") + target, data, headers), seconds)
        except (queue.Empty, TimeoutError):
            raise self._slow(what, seconds) from None
        except RemoteDisconnected as error:
            raise self._lost(what, error) from error
        except BadStatusLine as error:
            raise ServerError(f"{what} was answered with something else than HTTP: is this a vLLM server?") from error
        except ssl.SSLError as error:
            raise ConfigError(
                f"{what}: no TLS with this server ({error}): give tls=ssl.create_default_context(cafile=…) with what "
                "certifies it, or an http:// URL if it speaks no TLS"
            ) from error
        except (OSError, HTTPException) as error:
            raise self._lost(what, error) from error
        if len(found[1]) > _ANSWER_BYTES:
            raise ServerError(f"{what} was answered with more than {_ANSWER_BYTES} bytes: is this a vLLM server?")
        return found

    def _connection(self, seconds: float) -> HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return HTTPSConnection(host, port, timeout=seconds, context=self._tls or ssl.create_default_context())
        return HTTPConnection(host, port, timeout=seconds)

    def _slow(self, what: str, seconds: float) -> DeadlineError:
        return DeadlineError(what, seconds, [f"the server at {self.url}"])

    def _lost(self, what: str, error: Exception) -> PeerLostError:
        return PeerLostError(
            f"the server at {self.url}",
            f"{what} failed ({type(error).__name__}: {error}): if it has ended, start it again and have it join anew",
        )

    def _failure(self, status: int, what: str, data: bytes) -> WeftError:
        said = self._words(data)
        match status:
            case 401 | 403:
                given = "the api_key that was given" if self._key is not None else "a request without api_key"
                return ConfigError(f"{what} was answered {status}, which refuses {given}: {said}")
            case 404 | 405:
                return ConfigError(
                    f"{what} was answered {status}: no such route. A vLLM server has it with VLLM_SERVER_DEV_MODE=1 in "
                    "its environment; if /version is missing, too, the URL is not that of a vLLM server"
                )
            case _:
                return ServerError(f"{what} was answered {status}: {said or 'nothing'}")

    def _words(self, data: bytes) -> str:
        """What the server says: the message of an error as vLLM and FastAPI form it, or else all of it."""
        text = data.decode(errors="replace")
        with suppress(ValueError, RecursionError):
            found = json.loads(text)
            for name in ("error", "message", "detail"):
                found = found[name] if isinstance(found, dict) and name in found else found
            text = found if isinstance(found, str) else json.dumps(found)
        if self._key:
            text = text.replace(self._key, "…")  # some gateways repeat what they refuse
        return text[:_WORDS_CHARACTERS]


class _Exchange:
    """One request and its answer, in a thread that ends with the connection."""

    def __init__(self, connection: HTTPConnection) -> None:
        self._connection = connection
        self._socket: socket.socket | None = None
        self._found: queue.SimpleQueue[tuple[int, bytes] | Exception] = queue.SimpleQueue()

    def answer(self, request: tuple[str, str, bytes | None, Mapping[str, str]], seconds: float) -> tuple[int, bytes]:
        """Raises `queue.Empty` when the answer is not whole by then, and whatever the thread met."""
        threading.Thread(target=self._exchange, args=request, name="weft-http", daemon=True).start()
        try:
            found = self._found.get(timeout=seconds)
        finally:
            with suppress(OSError):  # most often it is closed by now
                if self._socket is not None:
                    self._socket.shutdown(socket.SHUT_RDWR)
        if isinstance(found, Exception):
            raise found
        return found

    def _exchange(self, verb: str, target: str, body: bytes | None, headers: Mapping[str, str]) -> None:
        try:
            self._connection.connect()
            self._socket = self._connection.sock
            self._connection.request(verb, target, body, dict(headers))
            with self._connection.getresponse() as response:
                data = response.read(_ANSWER_BYTES + 1)
                if response.length and len(data) <= _ANSWER_BYTES:
                    raise IncompleteRead(data, response.length)
                self._found.put((response.status, data))
        except Exception as error:  # noqa: BLE001 - whoever waits for the answer raises it
            self._found.put(error)
        finally:
            self._connection.close()


def _parts(url: str) -> tuple[SplitResult, list[str]]:
    """A URL's parts, and what is wrong with them; a password in it is not repeated."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # whose words may repeat a password
        faults = ["not a URL: its port is no number up to 65535, or a bracket is missing"]
        return urlsplit(""), faults
    faults = []
    if "@" in parts.netloc:
        faults.append("no name or password belongs into the URL: give api_key")
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        faults.append(f"{parts.scheme}://{parts.netloc}, expected http://HOST:PORT or https://HOST:PORT")
    if parts.query or parts.fragment:
        faults.append("a path ends the URL: leave out what follows ? or #")
    return parts, faults
