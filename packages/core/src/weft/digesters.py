"""Who computes the digests of a member's buckets: the processor its own memory's, a device its own."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import subprocess
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import numpy as np
import torch

from weft.digest import TABLE, Digest, Runs, Sums
from weft.digest_pieces import Piece, pieces
from weft.digest_torch import SIGNED, TorchSums, Units
from weft.errors import NotSupportedError
from weft.member import Region
from weft.views import byte_view

_LOG = logging.getLogger(__name__)

Held = tuple[torch.Tensor, Runs]
"""Dense memory, and where in it the elements lie that are digested."""
Digester = Callable[[], Digest]
"""The digest of what some memory holds now, after all that the current stream of its device has been asked to do."""

NUMPY, NUMBA, TRITON, TORCH = "numpy", "numba", "triton", "torch"
COMPILED_BYTES = 256 << 20
"""Memory of a member on the processor from which on its sums are compiled, if numba is there: that takes some two
seconds of every process, in which numpy sums 10 GB.
"""


class Digesters:
    """Makes the digesters of one member."""

    def __init__(self, regions: Collection[Region]) -> None:
        """Chooses how digests are computed on each device of this memory, and logs it if that is slow."""
        sizes: dict[torch.device, int] = {}
        for region in regions:
            sizes[region.device] = sizes.get(region.device, 0) + region.nbytes
        self._ways = {device: way_on(device, nbytes) for device, nbytes in sizes.items()}
        slow = sorted(str(device) for device, way in self._ways.items() if way == TORCH)
        if slow:
            _LOG.warning(
                "digests of memory on %s are computed by torch, many times slower than by Triton: it is not installed",
                ", ".join(slow),
            )
        self._tables: dict[torch.device, torch.Tensor] = {}

    @property
    def ways(self) -> tuple[str, ...]:
        """`numpy`, `numba`, `triton`, `torch`: those that are in use."""
        return tuple(sorted(set(self._ways.values())))

    def of(self, held: Sequence[Held]) -> Digester:
        """What computes the digest of all these elements together, as often as it is called."""
        parts: dict[torch.device, list[Held]] = {}
        for memory, runs in held:
            parts.setdefault(memory.device, []).append((memory, runs))
        made = [self._on(device, each) for device, each in parts.items()]
        return made[0] if len(made) == 1 else lambda: sum((digest() for digest in made), Digest())

    def _on(self, device: torch.device, held: Sequence[Held]) -> Digester:
        way = self._ways[device]
        if way == NUMBA:
            made: Digester = importlib.import_module("weft.digest_numba").NumbaSums(held)
            return made
        if way == NUMPY:
            return Sums([(byte_view(memory), runs) for memory, runs in held])
        if device not in self._tables:
            self._tables[device] = key_table(device)
        return on_device(way, [unit for each in held for unit in units(*each)], self._tables[device])


def refuse_devices(devices: Collection[torch.device]) -> None:
    """Raise `NotSupportedError` for devices whose memory cannot be digested."""
    others = sorted({str(device) for device in devices if device.type not in ("cpu", "cuda")})
    if others:
        raise NotSupportedError(
            f"digests of memory on {', '.join(others)} are not built yet: use Policy(digests=False)"
        )


def way_on(device: torch.device, nbytes: int) -> str:
    """How digests of a member's memory on a device are computed."""
    if device.type != "cpu":
        return TRITON if importlib.util.find_spec("triton") is not None else TORCH
    if nbytes < COMPILED_BYTES:
        return NUMPY
    try:
        importlib.import_module("weft.digest_numba")
    except (ImportError, OSError) as error:  # OSError: its LLVM does not load here
        _LOG.info("digests of %d bytes are computed by numpy, three times slower than by numba: %s", nbytes, error)
        return NUMPY
    return NUMBA


def key_table(device: torch.device) -> torch.Tensor:
    """The keys of `weft.digest`, int64 [lanes, words of a block]."""
    return torch.from_numpy(TABLE.view(np.int64)).to(device)


def on_device(way: str, each: Units, table: torch.Tensor) -> Digester:
    """A digester of pieces on one device, which waits for nothing but the current stream, and once.

    Raises `NotSupportedError` where Triton cannot make its kernels: it needs a C compiler, for one.
    """
    device = table.device
    try:
        sums = TorchSums if way == TORCH else importlib.import_module("weft.digest_triton").TritonSums
        with _current(device):
            compute = sums(each, table)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise NotSupportedError(
            f"digests of memory on {device} cannot be computed by {way}: {type(error).__name__}: {error}; mend that, "
            "or use Policy(digests=False)"
        ) from error

    def digest() -> Digest:
        with _current(device):
            lanes: list[int] = compute().tolist()
        return Digest((lanes[0], lanes[1])) + Digest()  # modulo 2⁶⁴

    return digest


def _current(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Triton's kernels run on the current device, which every thread has for itself."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def units(memory: torch.Tensor, runs: Runs) -> list[tuple[Piece, torch.Tensor]]:
    """The pieces of some runs, and their units in memory."""
    start = memory.storage_offset() * memory.element_size()
    found = []
    for piece in pieces(runs, math.gcd(8, memory.data_ptr(), start)):
        shape, strides = (piece.rows, piece.columns), (piece.row_bytes // piece.width, 1)
        dense = torch.empty(0, dtype=SIGNED[piece.width], device=memory.device)
        view = dense.set_(memory.untyped_storage(), (start + piece.offset) // piece.width, shape, strides)
        found.append((piece, view))
    return found
