"""Messages between the demo and its children: one JSON object a line over a socket pair, and no wait without a
deadline.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from weft_cli.demo.sessions import end_own_session

Reply = dict[str, Any]
Handler = Callable[..., Reply | None]
_DESCRIPTOR = "WEFT_DEMO_CHANNEL"


class Channel:
    """One end of a socket pair that carries JSON lines."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._pending = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one message. Raises `OSError` when the other end is gone."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Reply | None:
        """Block for what is available and return one whole message, or None when only part of one has come.

        Raises `EOFError` when the other end has closed.
        """
        if b"\n" not in self._pending:
            data = self.socket.recv(1 << 20)
            if not data:
                raise EOFError("the other end of the channel has closed")
            self._pending += data
        line, newline, rest = self._pending.partition(b"\n")
        if not newline:
            return None
        self._pending = rest
        message: Reply = json.loads(line)
        return message


def child_environment(end: socket.socket) -> dict[str, str]:
    """What a child needs in its environment to find its end of the channel; pass the descriptor on as well."""
    return {_DESCRIPTOR: str(end.fileno())}


def serve(handlers: Mapping[str, Handler]) -> None:
    """A child's main loop: answer each command with its handler until `stop` comes. What a handler raises ends the
    child, traceback in its log.

    When the parent vanishes, even in the middle of a command, the child's whole session is ended: it must not outlive
    the demo.
    """
    channel = Channel(socket.socket(fileno=int(os.environ.pop(_DESCRIPTOR))))
    commands: list[Reply] = []
    arrived = threading.Condition()

    def read() -> None:
        while True:
            try:
                message = channel.receive()
            except (OSError, EOFError):
                end_own_session()
                return
            if message is None:
                continue
            with arrived:
                commands.append(message)
                arrived.notify()
            if message["do"] == "stop":
                return

    threading.Thread(target=read, name="commands", daemon=True).start()
    while True:
        with arrived:
            arrived.wait_for(lambda: bool(commands))
            command = commands.pop(0)
        action = command.pop("do")
        if action == "stop":
            return
        channel.send(handlers[action](**command) or {})
