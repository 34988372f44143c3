"""Megatron-Core's own refit in a process of its own, of one rank."""

from __future__ import annotations

import msgspec

from weft.deadline import Deadline
from weft.errors import WeftError
from weft.stores import open_store
from weft_cli.bench.megatron_refit import MegatronRefit
from weft_cli.bench.settings import Case, Seat


def refit_and_spoil(argument: bytes) -> bytes:
    """What `check` says after a refit, and what it says when the target has been poisoned after it."""
    case, url = msgspec.msgpack.decode(argument, type=tuple[Case, str])
    deadline, words = Deadline.after(case.seconds), []
    refit = MegatronRefit(case, Seat(name="rank/0", source=0, target=0), open_store(url, deadline), 1, deadline)
    for spoil in (False, True):
        refit.run()
        if spoil:
            refit.poison()
        try:
            refit.check()
            words.append("right")
        except WeftError as error:
            words.append(str(error))
    refit.close()
    return msgspec.msgpack.encode(words)
