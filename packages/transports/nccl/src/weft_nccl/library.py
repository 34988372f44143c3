"""The few functions of NCCL that are used, by ctypes: signatures of `nccl.h`, which are stable within version 2."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weft.errors import ConfigError, TransportError

OLDEST = 21800
"""NCCL 2.18: the first whose non-blocking communicators may be aborted while they are made."""
UNIQUE_ID_BYTES = 128
_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_MAGIC = 0xCAFEBEEF
_UNDEFINED = -(2**31)
_CONFIG_VERSION = 21700


class UniqueId(ctypes.Structure):
    """`ncclUniqueId`."""

    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


class Config(ctypes.Structure):
    """`ncclConfig_t` as of NCCL 2.17; later ones take it, by its size and version, and fill in the rest."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    )


def non_blocking(blocks: int) -> Config:
    """A configuration in which no call waits for a peer, and a kernel has at most so many thread blocks."""
    return Config(ctypes.sizeof(Config), _MAGIC, _CONFIG_VERSION, 0, _UNDEFINED, _UNDEFINED, blocks, None)


_COMMUNICATOR = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "ncclGetUniqueId": (ctypes.POINTER(UniqueId),),
    "ncclCommInitRankConfig": (
        ctypes.POINTER(_COMMUNICATOR),
        ctypes.c_int,
        UniqueId,
        ctypes.c_int,
        ctypes.POINTER(Config),
    ),
    "ncclCommGetAsyncError": (_COMMUNICATOR, ctypes.POINTER(ctypes.c_int)),
    "ncclCommAbort": (_COMMUNICATOR,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMMUNICATOR, ctypes.c_void_p),
    "ncclRecv": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMMUNICATOR, ctypes.c_void_p),
}


class Library:
    """NCCL. Communicators are integers (`ncclComm_t`); what fails raises `TransportError`.

    Calls that concern a communicator are made with its device current.
    """

    def __init__(self, functions: Any) -> None:
        """`functions` is the loaded library, whose attributes are its functions."""
        self._functions = functions
        for name, arguments in _SIGNATURES.items():
            getattr(functions, name).argtypes = arguments
            getattr(functions, name).restype = ctypes.c_int
        functions.ncclGetErrorString.argtypes, functions.ncclGetErrorString.restype = (ctypes.c_int,), ctypes.c_char_p
        functions.ncclGetLastError.argtypes, functions.ncclGetLastError.restype = (_COMMUNICATOR,), ctypes.c_char_p

    def version(self) -> int:
        """Such as 22703 for 2.27.3."""
        found = ctypes.c_int()
        self._call("ncclGetVersion", ctypes.byref(found))
        return found.value

    def unique_id(self) -> bytes:
        """What all members of a new communicator need; made by one of them."""
        made = UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made)

    def begin(self, unique_id: bytes, size: int, rank: int, blocks: int) -> int:
        """Begin to make a communicator whose kernels have at most so many blocks; `settled` says when it is there."""
        communicator = _COMMUNICATOR()
        identity = UniqueId.from_buffer_copy(unique_id)
        config = non_blocking(blocks)
        self._call("ncclCommInitRankConfig", ctypes.byref(communicator), size, identity, rank, ctypes.byref(config))
        if communicator.value is None:
            raise TransportError("NCCL's ncclCommInitRankConfig made no communicator")
        return communicator.value

    def settled(self, communicator: int) -> bool:
        """Whether it has finished what was asked of it last, and takes more."""
        return self._state(communicator) == _SUCCESS

    def fault(self, communicator: int) -> str:
        """What has broken it, in words; empty when nothing has."""
        state = self._state(communicator)
        if state in (_SUCCESS, _IN_PROGRESS):
            return ""
        more = self._functions.ncclGetLastError(communicator) or b""
        return f"NCCL reports {self._words(state)}{': ' if more else ''}{more.decode(errors='replace')}"

    @contextmanager
    def group(self) -> Iterator[None]:
        """Operations inside are issued together at the end. When one is refused the group is ended all the same."""
        self._call("ncclGroupStart")
        try:
            yield
        finally:
            self._call("ncclGroupEnd")

    def send(self, communicator: int, address: int, nbytes: int, peer: int, stream: int) -> None:
        """Add to the group."""
        self._call("ncclSend", address, nbytes, _UINT8, peer, communicator, stream)

    def receive(self, communicator: int, address: int, nbytes: int, peer: int, stream: int) -> None:
        """Add to the group."""
        self._call("ncclRecv", address, nbytes, _UINT8, peer, communicator, stream)

    def abort(self, communicator: int) -> None:
        """End it and all that is under way in it; what it says is of no use to anybody any more."""
        self._functions.ncclCommAbort(communicator)

    def _state(self, communicator: int) -> int:
        state = ctypes.c_int()
        self._call("ncclCommGetAsyncError", communicator, ctypes.byref(state))
        return state.value

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._functions, name)(*arguments)
        if result not in (_SUCCESS, _IN_PROGRESS):
            raise TransportError(f"NCCL's {name} failed: {self._words(result)}")

    def _words(self, result: int) -> str:
        text: bytes = self._functions.ncclGetErrorString(result)
        return text.decode(errors="replace")


def load(name: str) -> Library:
    """The library by the loader's name or path. Raises `ConfigError` when it is not there or too old."""
    try:
        library = Library(ctypes.CDLL(name))
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"transport 'nccl' cannot load {name!r} ({error}): install torch for CUDA, which brings it, or give its "
            "path as option library"
        ) from error
    if library.version() < OLDEST:
        raise ConfigError(f"transport 'nccl' needs NCCL {OLDEST} or newer, {name!r} is {library.version()}: upgrade it")
    return library
