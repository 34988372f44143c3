"""What surrounds NCCL, with a stand-in for its functions; and the real library's where this machine has it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from weft.batches import Batch
from weft.errors import ConfigError, TransportError
from weft.member import Member
from weft.streams import Finished
from weft.testing.options import undocumented
from weft_nccl import NcclOptions, factory
from weft_nccl.communicator import NcclChannel, NcclNetwork
from weft_nccl.library import UNIQUE_ID_BYTES, Config, Library, load, non_blocking

SUCCESS, SYSTEM_ERROR, IN_PROGRESS = 0, 2, 7


class Function:
    """A function of the stand-in, which ctypes would give its types."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.argtypes: Any = None
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


@dataclass
class StandIn:
    """Keeps what it is asked, and says of its one communicator what a test wants."""

    state: int = IN_PROGRESS
    said: list[Any] = field(default_factory=list)
    refuses: str = ""

    def __post_init__(self) -> None:
        names = ("GroupStart", "GroupEnd", "Send", "Recv", "CommAbort")
        for name in names:
            setattr(self, f"nccl{name}", Function(lambda *arguments, name=name: self._note(name, *arguments)))
        self.ncclGetVersion = Function(self._version)
        self.ncclGetUniqueId = Function(lambda into: SUCCESS)
        self.ncclCommInitRankConfig = Function(self._begin)
        self.ncclCommGetAsyncError = Function(self._state)
        self.ncclGetErrorString = Function(lambda code: b"code %d" % code)
        self.ncclGetLastError = Function(lambda communicator: b"the cable")

    def _note(self, name: str, *arguments: Any) -> int:
        self.said.append((name, *arguments))
        if name == "GroupEnd":
            self.state = IN_PROGRESS
        return SYSTEM_ERROR if name == self.refuses else IN_PROGRESS if name == "GroupEnd" else SUCCESS

    def _version(self, into: Any) -> int:
        into._obj.value = 22703
        return SUCCESS

    def _begin(self, communicator: Any, size: int, identity: Any, rank: int, config: Any) -> int:
        assert config._obj.blocking == 0
        communicator._obj.value = 77
        self.said.append(("begin", size, rank))
        return IN_PROGRESS

    def _state(self, communicator: int, into: Any) -> int:
        assert communicator == 77
        into._obj.value = self.state
        return SUCCESS


@dataclass
class CpuLane:
    """A stream that does everything at once, and notes when it was current."""

    handle: int = 5
    current: bool = False

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        self.current = True
        yield
        self.current = False

    def mark(self) -> Finished:
        assert self.current
        return Finished()


def channel(stand_in: StandIn, sends: bool = True, staging: Sequence[torch.Tensor] = ()) -> NcclChannel:
    buffers = staging or [torch.zeros(8, dtype=torch.uint8) for _ in range(2)]
    return NcclChannel(Library(stand_in), bytes(UNIQUE_ID_BYTES), "b", sends, CpuLane(), buffers, 16)


def direct(*sizes: int) -> Batch:
    return Batch((), tuple(torch.zeros(size, dtype=torch.uint8) for size in sizes))


@pytest.mark.trap(36, 37)
def test_one_group_at_a_time_is_in_the_communicators_hands() -> None:
    nccl = StandIn()
    one = channel(nccl)
    assert nccl.said == [("begin", 2, 0)]
    assert not one.up()
    first, second = one.send(direct(3, 4)), one.send(direct(5))
    assert not first.poll()
    assert nccl.said[1:] == [], "issued before the communicator was made"
    nccl.state = SUCCESS
    assert one.up()
    assert not first.poll()
    sizes = [(each[0], each[2], each[4]) if len(each) > 1 else each[0] for each in nccl.said[1:]]
    assert sizes == ["GroupStart", ("Send", 3, 1), ("Send", 4, 1), "GroupEnd"]
    assert not second.poll()
    assert len(nccl.said) == 5, "a second group was issued while the first was in progress"
    nccl.state = SUCCESS
    assert not second.poll()
    assert first.poll()
    nccl.state = SUCCESS
    assert second.poll()


@pytest.mark.trap(37)
def test_a_batch_is_packed_before_its_group_and_unpacked_after_the_communicator_took_it() -> None:
    nccl = StandIn(state=SUCCESS)
    staging = torch.zeros(8, dtype=torch.uint8)
    out = Batch((torch.full((2,), 6, dtype=torch.uint8), torch.full((1,), 7, dtype=torch.uint8)), ())
    channel(nccl, staging=[staging, staging]).send(out)
    assert staging.tolist()[:3] == [6, 6, 7]
    assert nccl.said[2][1:3] == (staging.data_ptr(), 3)
    nccl = StandIn(state=SUCCESS)
    into = Batch(tuple(torch.full((size,), 0xA5, dtype=torch.uint8) for size in (2, 1)), ())
    transfer = channel(nccl, sends=False, staging=[staging, staging]).receive(into)
    assert nccl.said[2][:3] == ("Recv", staging.data_ptr(), 3)
    assert nccl.said[2][4] == 0, "the sender is rank 0"
    assert not transfer.poll()
    assert into.packed[0].tolist() == [0xA5, 0xA5], "unpacked before its bytes were asked for"
    nccl.state = SUCCESS
    assert transfer.poll()
    assert [piece.tolist() for piece in into.packed] == [[6, 6], [7]]


@pytest.mark.trap(40)
def test_an_error_that_nccl_reports_later_is_quoted_and_a_closed_channel_says_so() -> None:
    nccl = StandIn(state=SUCCESS)
    one = channel(nccl)
    transfer = one.send(direct(3))
    nccl.state = SYSTEM_ERROR
    with pytest.raises(TransportError, match=r"channel with b: NCCL reports code 2: the cable"):
        transfer.poll()
    one.close()
    one.close()
    assert one.abort is not None
    one.abort.join(60)
    assert [said for said in nccl.said if said[0] == "CommAbort"] == [("CommAbort", 77)]
    with pytest.raises(TransportError, match="closed"):
        transfer.poll()


def test_a_refused_operation_ends_its_group_and_is_an_error() -> None:
    nccl = StandIn(state=SUCCESS, refuses="Send")
    with pytest.raises(TransportError, match=r"NCCL's ncclSend failed: code 2"):
        channel(nccl).send(direct(3))
    assert nccl.said[-1] == ("GroupEnd",)


def test_the_configuration_has_the_layout_of_nccl_h() -> None:
    offsets = [getattr(Config, name).offset for name, _ in Config._fields_]
    assert offsets == [0, 8, 12, 16, 20, 24, 28, 32]
    made = non_blocking(16)
    assert (made.size, made.magic, made.version, made.blocking) == (40, 0xCAFEBEEF, 21700, 0)
    assert (made.cga_cluster_size, made.min_ctas, made.max_ctas, made.net_name) == (-(2**31), -(2**31), 16, None)
    assert ctypes.sizeof(Config) == 40


def test_a_machine_without_gpu_is_refused_with_what_to_use_instead() -> None:
    member = Member("a", None, None, None, 0, "here", "here", "cpu")
    transport = factory({})
    with pytest.raises(ConfigError, match=r"NCCL moves GPU memory, this member's device is cpu .*'gloo' or 'nixl'"):
        transport.open(member)
    transport.close()


def test_a_library_that_is_not_there_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"cannot load 'libno_such_nccl.so' .*install torch for CUDA"):
        load("libno_such_nccl.so")


def test_wrong_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'mpi' is none of nccl, gloo"):
        factory({"backend": "mpi"})
    with pytest.raises(ConfigError, match=r"staging must be"):
        factory({"batch_bytes": 10, "staging_bytes": 11})


def test_channels_that_could_wait_for_each_other_on_the_gpu_are_refused_with_the_numbers() -> None:
    network = NcclNetwork("libnccl.so.2", 1, blocks=16, most_channels=8)
    network.check_room(128)
    with pytest.raises(ConfigError, match=r"8 channels .* of 16 blocks may need 128 .* has 108: lower"):
        network.check_room(108)


def test_every_option_is_documented() -> None:
    assert undocumented(NcclOptions) == []
