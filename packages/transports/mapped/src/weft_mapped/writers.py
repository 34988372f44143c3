"""The threads that copy: posts in the order in which they may leave, chunk by chunk."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from weft.contracts import Bucket, Event
from weft.deadline import Deadline
from weft.endpoint import Envelope
from weft.errors import PeerLostError, TransportError
from weft_mapped.chunks import Chunk

_PAUSE_SECONDS = 1e-3
_SHORT_BYTES = 64 << 10
"""Copied in about 10 µs."""
_END_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class Send:
    """A prepared bucket."""

    bucket: Bucket
    chunks: list[Chunk]
    device: torch.device
    """Where its bytes come from: a CUDA device if any of them do."""
    post: Post | None = None
    """The active one."""
    running: int = 0
    """Copies under way, those of posts that have ended included."""

    @property
    def short(self) -> bool:
        """Whether it is copied sooner than another thread would begin."""
        whole = len(self.chunks) <= 1 and all(chunk.nbytes <= _SHORT_BYTES for chunk in self.chunks)
        return whole and self.device.type == "cpu"


@dataclass(slots=True, eq=False)
class Post:
    """A bucket on its way."""

    send: Send
    envelope: Envelope
    after: Event | None
    left: deque[Chunk] = field(init=False)
    """Not begun."""
    error: TransportError | None = None
    begun: bool = False
    """Whether a copy of it was."""
    pause: float = 0.0
    """Not before this instant, of `time.monotonic`."""

    def __post_init__(self) -> None:
        self.left = deque(self.send.chunks)

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.send.post is self


class Writers:
    """What is posted, and the threads that copy it."""

    def __init__(
        self,
        name: str,
        threads: int,
        state: threading.Condition,
        announce: Callable[[Post], None],
        lose: Callable[[PeerLostError], None],
    ) -> None:
        """`state` guards everything here, and is held when `announce` (bytes are in place) and `lose` are called."""
        self._state, self._announce, self._lose = state, announce, lose
        self._posts: list[Post] = []
        """Those that have not ended, in the order in which they came."""
        self._ending = False
        self._threads = [
            threading.Thread(target=self._run, name=f"weft-mapped {name} {number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, post: Post) -> None:
        """Copy it once its event is reached: a short one that may leave here and now, since waking a thread takes
        longer.
        """
        with self._state:
            post.send.post = post
            self._posts.append(post)
            job = self._begin(post) if post.send.short else None
            if job is None:
                self._state.notify_all()
        if job is not None:
            self._move(*job)

    def end(self, post: Post, error: TransportError | None = None) -> None:
        """Begin no more of it. Idempotent."""
        with self._state:
            if post.active:
                post.send.post, post.error = None, error
                self._posts = [each for each in self._posts if each is not post]

    def end_all(self, sends: Sequence[Send], error: TransportError | None = None) -> None:
        """End what is posted of these."""
        with self._state:
            for post in [send.post for send in sends if send.post is not None]:
                self.end(post, error)

    def busy(self) -> bool:
        """Whether something that may leave has not arrived."""
        with self._state:
            return any(_may_leave(post) for post in self._posts)

    def settle(self, sends: Sequence[Send]) -> None:
        """Wait for copies under way, which take milliseconds; their memory may go afterwards."""
        Deadline.after(_END_SECONDS).wait(lambda: not any(send.running for send in sends), "copies under way", list)

    def close(self) -> None:
        """End everything, and the threads."""
        with self._state:
            self._ending = True
            self._state.notify_all()
        for thread in self._threads:
            thread.join(_END_SECONDS)
        for post in list(self._posts):
            self.end(post, PeerLostError(post.send.bucket.peer, "closed"))

    def _run(self) -> None:
        while True:
            with self._state:
                job = self._take()
                while job is None and not self._ending:
                    self._state.wait(_PAUSE_SECONDS if self._posts else None)
                    job = self._take()
                if job is None or self._ending:
                    return
            self._move(*job)

    def _move(self, post: Post, chunk: Chunk) -> None:
        moved, error = False, None
        try:
            moved = chunk.move()
        except TransportError as caught:
            error = caught
        with self._state:
            post.send.running -= 1
            self._advance(post, chunk, moved, error)

    def _take(self) -> tuple[Post, Chunk] | None:
        """The next copy to make, counted as running."""
        for post in list(self._posts):
            job = self._begin(post)
            if job is not None:
                return job
        return None

    def _begin(self, post: Post) -> tuple[Post, Chunk] | None:
        """A copy of this post, if one may be made now. A post without any ends here."""
        if not post.begun and post.send.running:
            return None  # an earlier post of the bucket was cancelled in the middle of a copy
        if time.monotonic() < post.pause or not _may_leave(post):
            return None
        if post.error is not None:
            self.end(post, post.error)
        elif post.left:
            post.begun = True
            post.send.running += 1
            return post, post.left.popleft()
        elif not post.send.chunks:
            self._arrive(post)
        return None

    def _advance(self, post: Post, chunk: Chunk, moved: bool, error: TransportError | None) -> None:
        if not post.active:
            return
        if error is not None:
            self.end(post, error)
            if isinstance(error, PeerLostError):
                self._lose(error)
        elif not moved:
            post.left.appendleft(chunk)
            post.pause = time.monotonic() + _PAUSE_SECONDS
            self._state.notify_all()
        elif not post.left and not post.send.running:
            self._arrive(post)

    def _arrive(self, post: Post) -> None:
        self._announce(post)
        self.end(post)


def _may_leave(post: Post) -> bool:
    """Whether its event is reached. A post whose event is broken need not wait either: it has failed."""
    try:
        return post.after is None or post.after.query()
    except RuntimeError as error:  # torch's, of CUDA
        words = str(error).partition("\n")[0]
        post.error = TransportError(f"the event that bucket {post.envelope.bucket} waited for is broken: {words}")
        return True
