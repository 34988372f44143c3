"""A connection to one peer: a process group of two, a thread that sends and a thread that receives.

gloo's work objects cannot be asked whether they are finished, only waited for; hence the threads. Their waits have no
deadline of their own: callers have theirs and never wait here, and `close` ends every wait.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from weft.deadline import Deadline
from weft.endpoint import Envelope, decode
from weft.errors import PeerLostError, RecordError, TransportError, WeftError
from weft_gloo.messages import Message

HEAD_BYTES = 512
"""Every parcel starts with a message of this size: four bytes of length, then what fits of the envelope."""
_LENGTH_BYTES = 4
_TAG = 0
_WAKE_TAG = 1
_UNTIL_CLOSED = timedelta(days=30)
_END_SECONDS = 5.0
_LOOK_SECONDS = 0.001
LINGER_SECONDS = 1.0
"""Longest wait of who closes for the peers' answers."""
_FAREWELL = b""
"""The envelope of who closes, and the answer to it: gloo loses what has arrived but was not looked at when a connection
ends.
"""


@dataclass(eq=False)
class Parcel:
    """An envelope and the payload that follows it."""

    envelope: bytes
    payload: Sequence[Message]
    started: bool = False
    done: bool = False
    error: TransportError | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """Where a bucket's payload goes."""

    payload: Sequence[Message]
    wanted: bool = True
    """False for what nobody waits for any more: it is taken in and dropped."""


_SIGNAL = Expected(())


class Link:
    """One life of a connection. `meet` makes the process group; it runs in the link's own thread."""

    def __init__(
        self,
        peer: str,
        meet: Callable[[Callable[[], bool]], Any],
        remote_rank: int,
        staging_bytes: int,
        depth: int,
        expected: Callable[[Envelope, Callable[[], bool]], Expected | None],
        deliver: Callable[[Envelope], None],
        lost: Callable[[PeerLostError], None],
    ) -> None:
        self.peer = peer
        self.error: TransportError | None = None
        self.up = False
        self._meet, self._remote_rank, self._depth = meet, remote_rank, depth
        self._expected, self._deliver, self._lost = expected, deliver, lost
        self._staging_bytes = staging_bytes
        self._group: Any | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._open_parcels: set[Parcel] = set()
        self._farewell_said = False
        self._parted = False
        """Whether the peer has said farewell: it has everything, and says no more."""
        self._receiver = threading.Thread(target=self._receive, name=f"weft-gloo from {peer}", daemon=True)
        self._sender = threading.Thread(target=self._send, name=f"weft-gloo to {peer}", daemon=True)
        self._receiver.start()

    def ready(self) -> bool:
        """Whether both sides have come. Raises what prevented it."""
        if self.error is not None:
            raise self.error
        return self.up

    def submit(self, parcel: Parcel) -> None:
        """Send it after everything submitted before. A broken link marks it failed at once."""
        with self._lock:
            if self.error is not None:
                parcel.error, parcel.done = self.error, True
                return
            self._open_parcels.add(parcel)
        self._parcels.put(parcel)

    def cancel(self, parcel: Parcel) -> None:
        """Do not send it, unless it has started already."""
        with self._lock:
            if not parcel.started:
                parcel.done = True
                self._open_parcels.discard(parcel)

    def say_farewell(self) -> None:
        """Nothing is submitted after this; the peer answers when it has everything that was."""
        with self._lock:
            says = not self._farewell_said and bool(self.up or self._open_parcels)
            self._farewell_said |= says
        if says:
            self.submit(Parcel(_FAREWELL, ()))

    def close(self, linger: Deadline) -> None:
        """End both threads. What was submitted arrives before, if it can by the deadline."""
        self.say_farewell()
        while self._farewell_said and not (self._parted or self.error is not None or linger.expired()):
            time.sleep(_LOOK_SECONDS)
        self._closing = True
        self._fail("closed")
        group = self._group
        if group is not None:
            # A wait that times out closes gloo's sockets, which ends every other wait: the only way to interrupt one.
            never = torch.empty(1, dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):
                group.recv([never], self._remote_rank, _WAKE_TAG).wait(timedelta(milliseconds=1))
        self._parcels.put(None)
        for thread in (self._receiver, self._sender):
            if thread.is_alive():
                thread.join(_END_SECONDS)
        self._group = None

    def _closed(self) -> bool:
        return self._closing

    def _fail(self, reason: str) -> None:
        with self._lock:
            first = self.error is None
            if first:
                self.error = PeerLostError(self.peer, reason)
            self.up = False
            parcels, self._open_parcels = self._open_parcels, set()
        for parcel in parcels:
            parcel.error, parcel.done = self.error, True
        if first and not self._closing:
            self._lost(PeerLostError(self.peer, reason))

    def _receive(self) -> None:
        try:
            self._group = self._meet(self._closed)
            self.up = True
            self._sender.start()
            staging = self._buffers()
            head = torch.empty(HEAD_BYTES, dtype=torch.uint8)
            while not self._closing:
                envelope = self._receive_envelope(head)
                if envelope is None:
                    self._parted = True
                    self.say_farewell()
                    continue
                expected = _SIGNAL if envelope.bucket is None else self._expected(envelope, self._closed)
                if expected is None:
                    break
                self._receive_payload(expected.payload, staging)
                if expected.wanted:
                    self._deliver(envelope)
        except (RuntimeError, WeftError) as error:
            self._fail(str(error).partition("\n")[0])
            self._parcels.put(None)

    def _receive_envelope(self, head: torch.Tensor) -> Envelope | None:
        """None is a farewell."""
        self._recv(head).wait(_UNTIL_CLOSED)
        wire = head.numpy().tobytes()
        length = int.from_bytes(wire[:_LENGTH_BYTES], "little")
        if not length:
            return None
        body = wire[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if length > len(body):
            if length > 2 * 65536:
                raise RecordError(f"{self.peer} announces an envelope of {length} bytes")
            rest = torch.empty(length - len(body), dtype=torch.uint8)
            self._recv(rest).wait(_UNTIL_CLOSED)
            body += rest.numpy().tobytes()
        return decode(body, self.peer)

    def _receive_payload(self, payload: Sequence[Message], staging: list[torch.Tensor]) -> None:
        flight: deque[tuple[Any, Message, torch.Tensor]] = deque()
        for index, message in enumerate(payload):
            if len(flight) == self._depth:
                self._arrived(*flight.popleft())
            buffer = staging[index % self._depth][: message.nbytes] if message.packed else message.pieces[0]
            flight.append((self._recv(buffer), message, buffer))
        for entry in flight:
            self._arrived(*entry)

    def _arrived(self, work: Any, message: Message, buffer: torch.Tensor) -> None:
        work.wait(_UNTIL_CLOSED)
        if message.packed:
            message.scatter(buffer)

    def _send(self) -> None:
        try:
            staging = self._buffers()
            while (parcel := self._parcels.get()) is not None:
                with self._lock:
                    if parcel.done:
                        continue
                    parcel.started = True
                flight: deque[Any] = deque()
                for tensor in self._tensors(parcel, staging, flight):
                    flight.append(self._sent(tensor))
                while flight:
                    flight.popleft().wait(_UNTIL_CLOSED)
                with self._lock:
                    parcel.done = True
                    self._open_parcels.discard(parcel)
        except RuntimeError as error:
            self._fail(str(error).partition("\n")[0])

    def _tensors(self, parcel: Parcel, staging: list[torch.Tensor], flight: deque[Any]) -> Iterator[torch.Tensor]:
        """What to send, one after another; waits for the oldest send when `depth` are in flight."""
        wire = len(parcel.envelope).to_bytes(_LENGTH_BYTES, "little") + parcel.envelope
        yield torch.frombuffer(bytearray(wire[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0")), dtype=torch.uint8)
        if len(wire) > HEAD_BYTES:
            yield torch.frombuffer(bytearray(wire[HEAD_BYTES:]), dtype=torch.uint8)
        for index, message in enumerate(parcel.payload):
            while len(flight) >= self._depth:
                flight.popleft().wait(_UNTIL_CLOSED)
            yield message.gather(staging[index % self._depth]) if message.packed else message.pieces[0]

    def _buffers(self) -> list[torch.Tensor]:
        return [torch.empty(self._staging_bytes, dtype=torch.uint8) for _ in range(self._depth)]

    def _recv(self, tensor: torch.Tensor) -> Any:
        return self._alive().recv([tensor], self._remote_rank, _TAG)

    def _sent(self, tensor: torch.Tensor) -> Any:
        return self._alive().send([tensor], self._remote_rank, _TAG)

    def _alive(self) -> Any:
        group = self._group
        if group is None:
            raise RuntimeError("closed")
        return group
