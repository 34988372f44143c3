"""A holder without a model: it reads every version that is published, and gives on what it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from typing import Any

import torch

from weft.authentication import Secret
from weft.builder import LayoutBuilder
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError
from weft.formats import CHECKPOINT
from weft.job_store import JobStore
from weft.layout import Layout
from weft.live import LiveTarget
from weft.opened import Opened
from weft.policy import Policy
from weft.publication.copies import copies_bytes
from weft.publication.holders import Directory
from weft.publication.subscriber import Subscriber
from weft.report import Report
from weft.shadow import available_bytes, beside
from weft.stores import open_store


class Keeper(Opened):
    """Keeps the newest `retain` versions of a job in host memory while its trainer and its replicas come and go.

    It is a replica of one member that serves nobody but other replicas, and holds whole tensors, however those that it
    reads from have cut them. Use it as a context manager; for one thread.
    """

    def __init__(
        self, *, name: str = "keeper", retain: int = 1, store: str, job: str, transport: str,
        transport_options: Mapping[str, Any] | None = None, deadlines: Deadlines | None = None,
        policy: Policy | None = None, host: str | None = None, domain: str | None = None,
        secret: Secret | bytes | str | None = None,
    ) -> None:  # fmt: skip
        """`name` is that by which others know this holder, unique in the job."""
        self._name, self._retain, self._store_url, self._job = name, retain, store, job
        self._deadlines = deadlines or Deadlines()
        self._secret = secret if isinstance(secret, Secret | None) else Secret(secret)
        self._options: dict[str, Any] = {
            "transport": transport, "transport_options": transport_options, "policy": policy, "host": host,
            "domain": domain, "secret": self._secret, "deadlines": self._deadlines,
        }  # fmt: skip
        self._stack = ExitStack()
        self.host_bytes = 0
        """Host memory that `open` has allocated: a version that comes in, and what a `Publisher` of as many has."""

    @property
    def holder(self) -> str:
        """From whom it has read last; empty when it is nobody."""
        return self._subscriber.holder

    @property
    def versions(self) -> tuple[int, ...]:
        """What it keeps, the newest first."""
        return self._subscriber.versions

    def open(self) -> None:
        """Wait until somebody holds a version, and make room for what that consists of.

        Raises `DeadlineError` after `Deadlines.offer`, and `ConfigError` when the host has too little memory.
        """
        limit = Deadline.after(self._deadlines.offer)
        try:
            with closing(open_store(self._store_url, limit)) as store:
                directory = Directory(JobStore(store, self._job, self._secret))
                holder, *_ = directory.newer(-1, lambda holder: (), limit)
                layout = whole(directory.held(holder).values())
            host = torch.device("cpu")
            needed, available = copies_bytes(layout, self._retain + 1), available_bytes(host)
            if available is not None and needed > available:
                raise ConfigError(
                    f"keeping {self._retain} versions, beside one that comes in and the next one, needs {needed} bytes "
                    f"of host memory, and {available} are available: retain fewer"
                )
            target = LiveTarget(layout, beside(layout, host, pinned=False), lambda: None)
            self._subscriber = self._stack.enter_context(
                Subscriber(
                    target=target, replica=self._name, relay=True, retain=self._retain, store=self._store_url,
                    job=self._job, name=f"{self._name}/0", **self._options,
                )
            )  # fmt: skip
            self.host_bytes = needed
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Keep nothing any more. Idempotent."""
        self._stack.close()

    def keep(self, deadline: Deadline) -> Report:
        """The next version, as soon as somebody has one. Raises as `Subscriber.receive` does."""
        return self._subscriber.receive(deadline)


def whole(layouts: Iterable[Layout]) -> Layout:
    """One member that holds all tensors of these layouts, each whole in a buffer of its own."""
    builder, ties, built = LayoutBuilder(), set[tuple[str, str]](), set[str]()
    for layout in layouts:
        tensors = {tensor.name: tensor for tensor in layout.tensors}
        groups = {buffer.name: layout.groups[buffer.group] for buffer in layout.buffers}
        for name, buffer in {piece.tensor: piece.buffer for piece in layout}.items():
            tensor, extra = tensors[name], layout.extra.get(name)
            format = layout.formats.get(name, CHECKPOINT)
            builder.tensor(name, tensor.shape, tensor.dtype, format=format, extra=extra)
            if name not in built:
                builder.buffer(name, tensor.dtype, tensor.numel, group=groups[buffer])
                builder.shard(name, name)
                built.add(name)
        ties.update((tie.alias, tie.name) for tie in layout.ties)
    for alias, name in sorted(ties):
        builder.tie(alias, name)
    return builder.build()
