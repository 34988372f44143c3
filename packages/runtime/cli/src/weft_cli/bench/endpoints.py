"""Endpoints of a transport by itself: opened, registered, connected and prepared without a refit around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from weft.contracts import SEGMENT, Bucket, Capabilities, TransferProgram, Transport
from weft.member import Member, Region, RemoteRegion
from weft.plugins import load
from weft.policy import Policy

GAP_BYTES = 64
"""Between segments, so that no two of them are one."""


def make_transport(name: str) -> Transport:
    """A transport with its defaults, not open yet. Raises `PluginError` for one that is not there."""
    made: Transport = load("weft.transports", name)({})
    return made


def member(name: str) -> Member:
    """One process on this machine."""
    return Member(
        name=name, source_layout=None, target_layout=None, replica=None, replica_size=1, host="here", domain="here",
        device="cpu",
    )  # fmt: skip


def region(nbytes: int) -> Region:
    """Fresh memory of which every page has been touched."""
    return Region("memory", torch.zeros(nbytes, dtype=torch.uint8))


def remote(region: Region) -> RemoteRegion:
    """The same as its peers see it."""
    return RemoteRegion(region.address, region.nbytes, str(region.device))


def buckets(peer: str, first: int, count: int, nbytes: int, capabilities: Capabilities) -> Iterator[Bucket]:
    """`count` segments of `nbytes` with gaps between them, at the same places of region 0 at both ends.

    Divided into buckets as refits are by default, with indices from `first`.
    """
    policy = Policy()
    most = min(policy.max_segments, capabilities.max_segments, max(1, policy.bucket_bytes // nbytes))
    rows = segments(count, nbytes)
    for number, start in enumerate(range(0, count, most)):
        yield Bucket(first + number, peer, rows[start : start + most])


def segments(count: int, nbytes: int) -> npt.NDArray[np.void]:
    """Rows of `weft.contracts.SEGMENT`."""
    rows = np.zeros(count, dtype=SEGMENT)
    rows["offset"] = rows["remote_offset"] = np.arange(count, dtype=np.int64) * (nbytes + GAP_BYTES)
    rows["nbytes"] = nbytes
    return rows


def program(
    sends: Sequence[Bucket], receives: Sequence[Bucket], own: Region, peer: str, theirs: RemoteRegion
) -> TransferProgram:
    """A program between two endpoints of one region each."""
    return TransferProgram(b"benchmark", tuple(sends), tuple(receives), (own,), {peer: (theirs,)})
