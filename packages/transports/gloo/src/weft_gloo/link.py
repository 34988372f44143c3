"""A connection to one peer: a process group of two, and threads that send, look for heads, and take payload in.

A parcel is a *head*, which says what comes, and payload. Heads have a tag of their own and run ahead of the payload of
earlier parcels, so that the next payload's receives are posted before the last byte of the former has come.

gloo's work objects cannot be asked whether they are finished, only waited for; hence the threads. Their waits have no
deadline of their own: callers have theirs and never wait here, and `close` ends every wait.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from weft.deadline import Deadline
from weft.endpoint import Envelope, decode
from weft.errors import PeerLostError, TransportError, WeftError
from weft_gloo.messages import Message
from weft_gloo.parcels import FAREWELL, HEAD_BYTES, SIGNAL, Expected, Parcel, announcement, read_head

_HEAD_TAG, _REST_TAG, _TAG, _WAKE_TAG = range(4)
_AHEAD = 2
"""Most parcels announced whose payload has not been posted: the one that is being sent, and the next."""
_UNTIL_CLOSED = timedelta(days=30)
_END_SECONDS = 5.0
"""Longest wait for each thread when a connection is closed."""
_BROKEN_END_SECONDS = 0.5
"""The same for a connection that had broken: gloo may then forget a send, and nothing ends the wait for it any more."""
_LOOK_SECONDS = 0.001
LINGER_SECONDS = 1.0
"""Longest wait of who closes for the peers' answers."""


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
        progressed: Callable[[], None],
    ) -> None:
        """`progressed` is called, in one of the link's threads, when a parcel is done."""
        self.peer = peer
        self.error: TransportError | None = None
        self.up = False
        self._meet, self._remote_rank, self._depth = meet, remote_rank, depth
        self._expected, self._deliver, self._lost, self._progressed = expected, deliver, lost, progressed
        self._staging_bytes = staging_bytes
        self._group: Any | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._parcels: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._open_parcels: set[Parcel] = set()
        self._farewell_said = False
        self._parted = False
        """Whether the peer has said farewell: it has everything, and says no more."""
        self._arrivals: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """What to do about heads and messages, in the order in which they were announced."""
        self._receivable: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        """Staging buffers, one for each message that may still be on its way here."""
        self._threads = [
            threading.Thread(target=run, name=f"weft-gloo {what} {peer}", daemon=True)
            for run, what in ((self._look, "from"), (self._take, "take from"), (self._send, "to"))
        ]
        for thread in self._threads[:-1]:
            thread.start()

    def ready(self) -> bool:
        """Whether both sides have come. Raises what prevented it."""
        if self.error is not None:
            raise self.error.again()
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
        """Do not send it, unless it has been announced already."""
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
            self.submit(Parcel(FAREWELL, ()))

    def close(self, linger: Deadline) -> None:
        """End all threads. What was submitted arrives before, if it can by the deadline."""
        self.say_farewell()
        while self._farewell_said and not (self._parted or self.error is not None or linger.expired()):
            time.sleep(_LOOK_SECONDS)
        end_seconds = _END_SECONDS if self.error is None else _BROKEN_END_SECONDS
        self._closing = True
        self._fail("closed")
        self._arrivals.put(None)
        group = self._group
        if group is not None:
            # A wait that times out closes gloo's sockets, which ends every other wait: the only way to interrupt one.
            never = torch.empty(1, dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):
                group.recv([never], self._remote_rank, _WAKE_TAG).wait(timedelta(milliseconds=1))
        for thread in self._threads:
            if thread.is_alive():
                thread.join(end_seconds)
        self._group = None
        with contextlib.suppress(queue.Empty):  # what nobody takes any more refers to this link
            while True:
                self._arrivals.get_nowait()
        self._arrivals.put(None)

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
        self._parcels.put(None)
        self._receivable.put(None)
        if first and not self._closing:
            self._lost(PeerLostError(self.peer, reason))

    def _failing(self, error: Exception) -> Callable[[], None]:
        return functools.partial(self._fail, str(error).partition("\n")[0])

    def _look(self) -> None:
        """Meet, then take in heads and post the receives of what they announce."""
        try:
            self._group = self._meet(self._closed)
            self.up = True
            self._threads[-1].start()
            for buffer in self._buffers():
                self._receivable.put(buffer)
            made = [torch.empty(HEAD_BYTES, dtype=torch.uint8) for _ in range(self._depth)]
            heads = deque((self._recv(head, _HEAD_TAG), head) for head in made)
            while not self._closing:
                work, head = heads.popleft()
                work.wait(_UNTIL_CLOSED)
                body, missing = read_head(head, self.peer)  # bytes of its own: the head may take the next one
                heads.append((self._recv(head, _HEAD_TAG), head))
                self._announced(self._envelope(body, missing))
        except (RuntimeError, WeftError) as error:
            self._arrivals.put(self._failing(error))
        self._arrivals.put(None)

    def _envelope(self, body: bytes, missing: int) -> Envelope | None:
        """None is a farewell."""
        if missing:
            rest = torch.empty(missing, dtype=torch.uint8)
            self._recv(rest, _REST_TAG).wait(_UNTIL_CLOSED)
            body += rest.numpy().tobytes()
        return decode(body, self.peer) if body else None

    def _announced(self, envelope: Envelope | None) -> None:
        if envelope is None:
            self._arrivals.put(self._part)
            return
        expected = SIGNAL if envelope.bucket is None else self._expected(envelope, self._closed)
        for message in expected.payload if expected is not None else ():
            staging = self._receivable.get()
            if staging is None:
                return
            buffer = staging[: message.nbytes] if message.packed else message.pieces[0]
            work = self._recv(buffer, _TAG)
            self._arrivals.put(functools.partial(self._arrived, work, message, buffer, staging))
        if expected is not None and expected.wanted:
            self._arrivals.put(functools.partial(self._deliver, envelope))

    def _take(self) -> None:
        """Do what is to be done about what arrives."""
        try:
            while (act := self._arrivals.get()) is not None:
                act()
        except (RuntimeError, WeftError) as error:
            self._failing(error)()

    def _arrived(self, work: Any, message: Message, buffer: torch.Tensor, staging: torch.Tensor) -> None:
        work.wait(_UNTIL_CLOSED)
        if message.packed:
            message.scatter(buffer)
        self._receivable.put(staging)

    def _part(self) -> None:
        self._parted = True
        self.say_farewell()

    def _send(self) -> None:
        """Announce parcels and send their payload, each as far ahead as it may."""
        announced: deque[tuple[Parcel, deque[Message]]] = deque()
        flight: deque[tuple[Any, torch.Tensor | None, Parcel | None]] = deque()
        free = self._buffers()
        try:
            while True:
                may_wait = not (announced or flight)
                parcel = self._next(may_wait) if len(announced) < _AHEAD else None
                if parcel is not None:
                    for tensor, tag in zip(announcement(parcel.envelope), (_HEAD_TAG, _REST_TAG), strict=False):
                        flight.append((self._sent(tensor, tag), None, None if parcel.payload else parcel))
                    if parcel.payload:
                        announced.append((parcel, deque(parcel.payload)))
                elif announced and free:
                    parcel, messages = announced[0]
                    message, staging = messages.popleft(), free.pop()
                    tensor = message.gather(staging) if message.packed else message.pieces[0]
                    flight.append((self._sent(tensor, _TAG), staging, None if messages else parcel))
                    if not messages:
                        announced.popleft()
                elif flight:
                    work, buffer, ended = flight.popleft()
                    work.wait(_UNTIL_CLOSED)
                    if buffer is not None:
                        free.append(buffer)
                    if ended is not None:
                        self._left(ended)
        except RuntimeError as error:
            self._arrivals.put(self._failing(error))

    def _next(self, wait: bool) -> Parcel | None:
        """The next parcel to announce; None when there is none yet."""
        try:
            parcel = self._parcels.get(block=wait)
        except queue.Empty:
            return None
        if parcel is None:
            raise RuntimeError("closed")
        with self._lock:
            if parcel.done:
                return None
            parcel.started = True
        return parcel

    def _left(self, parcel: Parcel) -> None:
        with self._lock:
            parcel.done = True
            self._open_parcels.discard(parcel)
        self._progressed()

    def _buffers(self) -> list[torch.Tensor]:
        return [torch.empty(self._staging_bytes, dtype=torch.uint8) for _ in range(self._depth)]

    def _recv(self, tensor: torch.Tensor, tag: int) -> Any:
        return self._alive().recv([tensor], self._remote_rank, tag)

    def _sent(self, tensor: torch.Tensor, tag: int) -> Any:
        return self._alive().send([tensor], self._remote_rank, tag)

    def _alive(self) -> Any:
        group = self._group
        if group is None:
            raise RuntimeError("closed")
        return group
