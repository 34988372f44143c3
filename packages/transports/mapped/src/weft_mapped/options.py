"""Options of the `mapped` transport."""

from __future__ import annotations

from typing import Annotated

import msgspec


class MappedOptions(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="mapped"):
    """What `transport_options` may hold."""

    threads: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "threads"})] = 2
    """Copies that a sender makes at once: one thread of a large machine does not fill its memory's bandwidth."""
    chunk_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 30)] = 4 << 20
    """Most bytes of one copy, which nothing interrupts: a cancelled post ends after it, and memory that is
    deregistered is waited for so long.
    """
    allow_writers: bool = True
    """Where Yama restricts who may write another process's memory (`ptrace_scope` 1), allow this process's own to
    every process of the same user, which then may also trace it. False needs shared memory, or CAP_SYS_PTRACE at
    whoever sends.
    """
