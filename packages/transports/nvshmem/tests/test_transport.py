"""The transport over an emulation of NVSHMEM, and what it says where there is none."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.contracts import SEGMENT, Bucket, Capabilities, Message, Prepared, TransferProgram
from weft.deadline import Deadline
from weft.errors import ConfigError
from weft.granted import GrantedTransport
from weft.member import Member, Region, RemoteRegion, Tag
from weft.testing.options import undocumented
from weft_nvshmem import NvshmemOptions, factory
from weft_nvshmem.network import NvshmemNetwork
from weft_nvshmem.transport import CAPABILITIES, transport_over

SLOT_BYTES = 1024
SIZE = 40_000
NAMES = ("a", "b", "c")
CPU = Capabilities(False, ("cpu",), False, CAPABILITIES.direct_run_bytes, CAPABILITIES.max_segments)


def emulation() -> Any:
    """The module beside this one."""
    spec = importlib.util.spec_from_file_location("nvshmem_emulation", Path(__file__).with_name("emulation.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["nvshmem_emulation"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def member(name: str) -> Member:
    return Member(name, "s", "t", None, 0, "here", "here", "cpu")


def rows_of(sender: str, receiver: str) -> np.ndarray[Any, Any]:
    """Segments of every length into a part of the receiver's memory that only this sender writes."""
    random = np.random.default_rng([ord(sender), ord(receiver)])
    lengths = random.integers(0, 4000, 12)
    share = SIZE // len(NAMES)
    lengths = lengths[np.cumsum(lengths) < share - 100]
    rows = np.zeros(len(lengths), SEGMENT)
    rows["nbytes"] = lengths
    rows["offset"] = random.integers(0, SIZE // 4, len(lengths))
    rows["remote_region"] = 1
    rows["remote_offset"] = NAMES.index(sender) * share + np.cumsum(lengths) - lengths
    return rows


def mirrored(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    out = np.zeros(len(rows), SEGMENT)
    for name, other in (("region", "remote_region"), ("offset", "remote_offset")):
        out[name], out[other] = rows[other], rows[name]
    out["nbytes"] = rows["nbytes"]
    return out


def together(actions: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(actions)

    def act(index: int) -> None:
        results[index] = actions[index]()

    threads = [threading.Thread(target=act, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


@pytest.mark.trap(28, 33, 34, 67)
def test_an_all_to_all_over_emulated_symmetric_memory_gives_every_byte_again_and_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    emulated = emulation()
    shared = emulated.Emulation(len(NAMES))
    options = NvshmemOptions(
        members=len(NAMES), store=f"file://{tmp_path}", world="w", host="127.0.0.1", slot_bytes=SLOT_BYTES
    )
    deadline = Deadline.after(120)
    ends: dict[str, GrantedTransport] = {}
    regions: dict[str, list[Region]] = {}
    with caplog.at_level(logging.WARNING, "weft.nvshmem"):
        for name in NAMES:
            network = NvshmemNetwork(options, emulated.EmulatedHardware(shared))
            ends[name] = transport_over(network, options, CPU)
            ends[name].open(member(name))
            memory = [torch.zeros(SIZE, dtype=torch.uint8) for _ in range(2)]
            regions[name] = [Region(f"r{index}", each) for index, each in enumerate(memory)]
            for region in regions[name]:
                ends[name].register(region, deadline)
    assert caplog.text.count("transport 'nvshmem' is unproven: it never ran on a GPU") == len(NAMES)
    try:
        for name, end in ends.items():
            for peer in NAMES:
                if peer != name:
                    end.connect(member(peer), ends[peer].address(), deadline)
        pairs = [(sender, receiver) for sender in NAMES for receiver in NAMES if sender != receiver]
        remote = {name: tuple(RemoteRegion(r.address, r.nbytes, "cpu") for r in regions[name]) for name in NAMES}

        def prepare(name: str) -> Prepared:
            sends = tuple(Bucket(i, r, rows_of(s, r)) for i, (s, r) in enumerate(pairs) if s == name)
            receives = tuple(Bucket(i, s, mirrored(rows_of(s, r))) for i, (s, r) in enumerate(pairs) if r == name)
            program = TransferProgram(b"key", sends, receives, tuple(regions[name]), remote)
            return ends[name].prepare(program, deadline)

        prepared = dict(zip(NAMES, together([lambda name=name: prepare(name) for name in NAMES]), strict=True))
        for version in range(3):
            for name in NAMES:
                source, target = (region.memory for region in regions[name])
                source.copy_(torch.from_numpy(np.random.default_rng([version, ord(name)]).integers(0, 256, SIZE)))
                target.fill_(0xA5)
            works = [
                ends[sender].post(prepared[sender], index, Tag(version, sender, 0, 0), b"n", None)
                for index, (sender, _) in enumerate(pairs)
            ]
            deadline.wait(lambda works=works: all(work.poll() for work in works), "posts", list)
            for name in NAMES:
                arrived: list[Message] = []
                deadline.wait(lambda e=ends[name], a=arrived: bool(a.extend(e.poll())) or len(a) == 2, "it", list)
                assert {message.tag.version for message in arrived} == {version}
                expected = torch.full((SIZE,), 0xA5, dtype=torch.uint8)
                for sender in NAMES:
                    if sender != name:
                        for _, offset, _, to, nbytes in rows_of(sender, name).tolist():
                            expected[to : to + nbytes] = regions[sender][0].memory[offset : offset + nbytes]
                assert torch.equal(regions[name][1].memory, expected)
        assert max(shared.sizes) == SLOT_BYTES, "no slot was ever full: the test moves too little"
    finally:
        together([end.close for end in ends.values()])
    assert sorted(shared.ended) == [0, 1, 2]


def test_a_machine_without_gpu_is_refused_with_what_to_use_instead() -> None:
    transport = factory({"members": 2, "store": "tcp://127.0.0.1:1", "world": "w"})
    with pytest.raises(ConfigError, match=r"NVSHMEM moves GPU memory, this member's device is cpu .*'gloo' or 'nixl'"):
        transport.open(member("a"))
    transport.close()


def test_what_the_world_needs_must_be_given_and_is_documented() -> None:
    with pytest.raises(ConfigError, match=r"needs the option members.*needs the option store.*needs the option world"):
        factory({})
    assert undocumented(NvshmemOptions) == []
