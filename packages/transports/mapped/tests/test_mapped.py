"""How memory is reached, and what keeps a sender from memory that is not its business any more."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from weft.contracts import SEGMENT, Bucket, TransferProgram, Work
from weft.deadline import Deadline
from weft.errors import ConfigError, PeerLostError, TransportError
from weft.expandable import CudaSegments
from weft.member import Member, Region, RemoteRegion, Tag
from weft.testing.options import undocumented
from weft_mapped import MappedOptions, MappedTransport, chunks, factory, gate
from weft_mapped.chunks import divide
from weft_mapped.kernel import IOVEC, MOST_IOVECS, Life, allow_writers, copy_memory, start_time, write_error
from weft_mapped.places import Owner, Private, Shared, shared_memory
from weft_mapped.transport import Address

SECONDS = 60.0
POISON = 0xA5
NBYTES = 40 * mmap.PAGESIZE + 17  # more than what is copied at once by who posts it


def member(name: str, host: str = "here") -> Member:
    return Member(name, "source", "target", None, 0, host, host, "cpu")


Make = Callable[..., MappedTransport]


@pytest.fixture
def endpoint() -> Iterator[Make]:
    """Opens endpoints, and closes them."""
    made: list[MappedTransport] = []

    def make(name: str, host: str = "here", **options: Any) -> MappedTransport:
        transport = factory(options)
        assert isinstance(transport, MappedTransport)
        transport.open(member(name, host))
        made.append(transport)
        return transport

    yield make
    for transport in made:
        transport.close()


def connect(a: MappedTransport, b: MappedTransport) -> None:
    for one, other, name in ((a, b, "b"), (b, a, "a")):
        one.connect(member(name), other.address(), Deadline.after(SECONDS))


def program(mine: Region, theirs: Region, key: bytes = b"key") -> TransferProgram:
    """All of one region to the other, from a to b."""
    rows = np.array([(0, 0, 0, 0, mine.nbytes)], SEGMENT)
    remote = RemoteRegion(theirs.address, theirs.nbytes, str(theirs.device))
    return TransferProgram(key, (Bucket(0, "b", rows),), (), (mine,), {"b": (remote,)})


def finish(work: Work) -> None:
    Deadline.after(SECONDS).wait(work.poll, "a post", list)


def region(memory: torch.Tensor, fill: int = POISON) -> Region:
    return Region("memory", memory.fill_(fill))


def private() -> torch.Tensor:
    return torch.empty(NBYTES, dtype=torch.uint8)


def by_memfd() -> torch.Tensor:
    """The middle of a file in memory, which starts at no page."""
    descriptor = os.memfd_create("weights")
    os.ftruncate(descriptor, 50 * mmap.PAGESIZE)
    whole = mmap.mmap(descriptor, 45 * mmap.PAGESIZE, offset=mmap.PAGESIZE)
    return torch.from_numpy(np.frombuffer(whole, np.uint8))[100 : 100 + NBYTES]


def by_name(folder: Path) -> torch.Tensor:
    """A file that nobody has open."""
    path = folder / "weights"
    path.write_bytes(bytes(NBYTES))
    return torch.from_file(str(path), shared=True, size=NBYTES, dtype=torch.uint8)


def by_torch() -> torch.Tensor:
    return private().share_memory_()


@pytest.mark.parametrize("kind", ["private", "by_torch", "by_memfd", "by_name"])
def test_shared_memory_is_mapped_and_private_memory_is_written(
    endpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "private": private, "by_torch": by_torch, "by_memfd": by_memfd, "by_name": lambda: by_name(tmp_path),
    }  # fmt: skip
    calls: list[str] = []
    for name in ("write_memory", "copy_memory"):
        original = getattr(chunks, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(chunks, name, counted)
    a, b = endpoint("a"), endpoint("b")
    mine, theirs = region(torch.arange(NBYTES).to(torch.uint8), 7), region(makers[kind]())
    a.register(mine, Deadline.after(SECONDS))
    b.register(theirs, Deadline.after(SECONDS))
    connect(a, b)
    mine.memory.copy_(torch.arange(NBYTES).to(torch.uint8))
    caplog.set_level(logging.INFO, "weft_mapped")
    finish(a.post(a.prepare(program(mine, theirs), Deadline.after(SECONDS)), 0, Tag(1, "a", 0, 0), b"", None))
    assert torch.equal(mine.memory, theirs.memory)
    way, call = ("written by process_vm_writev", "write_memory") if kind == "private" else ("mapped", "copy_memory")
    assert caplog.messages == [f"transport 'mapped': regions of b: 1 {way}"]
    assert set(calls) == {call}


def test_shared_memory_without_a_file_to_open_is_private() -> None:
    anonymous = mmap.mmap(-1, mmap.PAGESIZE)
    descriptor = os.memfd_create("gone")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    gone = mmap.mmap(descriptor, mmap.PAGESIZE)
    ranges = shared_memory(Path("/proc/self/maps").read_text())
    assert any(each.path == "/memfd:gone (deleted)" for each in ranges)
    owner = Owner()
    for memory, expected in ((anonymous, Private), (gone, Shared)):
        (how,) = owner.describe([Region("one", torch.from_numpy(np.frombuffer(memory, np.uint8)))])
        assert isinstance(how, expected)
    owner.close()
    assert shared_memory("7f00-7f10 rw-p 0 00:01 9 /x\n7f00-7f10 r--s 0 00:01 9 /x\n7f00-7f10 rw-s 0 00:01 0\n") == []


@pytest.mark.trap(42)
def test_segments_are_divided_into_bounded_copies_of_the_same_bytes() -> None:
    random = np.random.default_rng(1)
    rows = np.zeros(5000, SEGMENT)
    rows["nbytes"] = random.integers(1, 9, 5000)
    rows["nbytes"][3000::40] = random.integers(1, 50_000, 50)
    rows["offset"] = np.cumsum(rows["nbytes"]) - rows["nbytes"]
    rows["remote_offset"] = rows["offset"] + 1000
    parts = list(divide(rows, 16384))
    assert max(len(part) for part in parts) == MOST_IOVECS
    assert max(int(part["nbytes"].sum()) for part in parts) == 16384
    every = np.concatenate(parts)
    assert np.array_equal(every["remote_offset"], every["offset"] + 1000)
    assert np.array_equal(every["offset"], np.cumsum(every["nbytes"]) - every["nbytes"])
    assert every["nbytes"].sum() == rows["nbytes"].sum()
    assert list(divide(rows[:0], 4096)) == []


@pytest.mark.trap(49)
def test_a_peer_on_another_host_or_in_another_container_is_refused_by_name(endpoint: Make) -> None:
    a, b = endpoint("a"), endpoint("b", "there")
    with pytest.raises(TransportError, match=r"a is on 'here', b on 'there'; use transport nixl"):
        a.connect(member("b", "there"), b.address(), Deadline.after(SECONDS))
    c = endpoint("c")
    address = msgspec.msgpack.decode(c.address(), type=Address)
    other = msgspec.msgpack.encode(msgspec.structs.replace(address, processes=address.processes + 1))
    with pytest.raises(TransportError, match=r"of c: it is in another container.*--pid"):
        a.connect(member("c"), other, Deadline.after(SECONDS))


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EPERM, r"allow_writers.*CAP_SYS_PTRACE"), (errno.ENOSYS, r"seccomp profile pass process_vm_writev")],
)
def test_what_forbids_writing_is_said_when_preparing(
    endpoint: Make, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def forbidden(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    a, b = endpoint("a"), endpoint("b")
    mine, theirs, shared = region(private()), region(private()), region(by_torch())
    a.register(mine, Deadline.after(SECONDS))
    for each in (theirs, shared):
        b.register(each, Deadline.after(SECONDS))
    connect(a, b)
    monkeypatch.setattr(gate, "write_memory", forbidden)
    with pytest.raises(TransportError, match=words):
        a.prepare(program(mine, theirs), Deadline.after(SECONDS))
    prepared = a.prepare(program(mine, shared), Deadline.after(SECONDS))  # is mapped: nothing forbids it
    mine.memory.fill_(3)
    finish(a.post(prepared, 0, Tag(1, "a", 0, 0), b"", None))
    assert torch.equal(shared.memory, mine.memory)


@pytest.mark.trap(18, 31)
def test_memory_that_was_given_back_is_not_written_any_more(endpoint: Make) -> None:
    a, b = endpoint("a"), endpoint("b")
    mine, theirs = region(private(), 1), region(private())
    a.register(mine, Deadline.after(SECONDS))
    registration = b.register(theirs, Deadline.after(SECONDS))
    connect(a, b)
    prepared = a.prepare(program(mine, theirs), Deadline.after(SECONDS))
    b.deregister(registration)
    with pytest.raises(TransportError, match=r"not registered by b any more"):
        finish(a.post(prepared, 0, Tag(1, "a", 0, 0), b"", None))
    assert set(theirs.memory.tolist()) == {POISON}
    b.register(theirs, Deadline.after(SECONDS))
    connect(a, b)
    finish(a.post(a.prepare(program(mine, theirs), Deadline.after(SECONDS)), 0, Tag(2, "a", 0, 0), b"", None))
    assert set(theirs.memory.tolist()) == {1}


@pytest.mark.trap(18, 64)
def test_who_was_disconnected_writes_nothing_even_when_it_has_not_heard_of_it(
    endpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = endpoint("a"), endpoint("b")
    mine, theirs = region(private(), 1), region(private())
    a.register(mine, Deadline.after(SECONDS))
    b.register(theirs, Deadline.after(SECONDS))
    connect(a, b)
    prepared = a.prepare(program(mine, theirs), Deadline.after(SECONDS))
    assert a._opened is not None
    monkeypatch.setattr(a._opened.link, "lose", lambda error: None)  # a does not hear that its connection is closed
    b.disconnect("a")
    with pytest.raises(PeerLostError, match=r"lost b: it has disconnected"):
        finish(a.post(prepared, 0, Tag(1, "a", 0, 0), b"", None))
    assert set(theirs.memory.tolist()) == {POISON}


@pytest.mark.trap(40)
def test_giving_back_waits_for_a_copy_under_way_and_says_when_it_does_not_end(
    endpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = endpoint("a"), endpoint("b")
    mine, theirs = region(private(), 1), region(private())
    a.register(mine, Deadline.after(SECONDS))
    registration = b.register(theirs, Deadline.after(SECONDS))
    connect(a, b)
    prepared = a.prepare(program(mine, theirs), Deadline.after(SECONDS))
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> int:
        begun.set()
        assert go_on.wait(SECONDS)
        return original(*arguments)

    original = chunks.write_memory
    monkeypatch.setattr(chunks, "write_memory", slow)
    work = a.post(prepared, 0, Tag(1, "a", 0, 0), b"", None)
    assert begun.wait(SECONDS)
    monkeypatch.setattr(gate, "_SETTLE_SECONDS", 0.05)
    with pytest.raises(TransportError, match=r"a has been stopped in the middle of a copy"):
        b.deregister(registration)
    monkeypatch.setattr(gate, "_SETTLE_SECONDS", SECONDS)
    waits = threading.Thread(target=b.disconnect, args=("a",))
    waits.start()
    assert waits.is_alive()
    assert set(theirs.memory.tolist()) == {POISON}
    go_on.set()
    waits.join(SECONDS)
    assert not waits.is_alive()
    assert set(theirs.memory.tolist()) == {1}  # nothing changes after the wait
    work.cancel()


@pytest.mark.trap(40)
@pytest.mark.parametrize("nbytes", [100, NBYTES])
def test_a_receiver_that_takes_something_back_is_asked_again(endpoint: Make, nbytes: int) -> None:
    a, b = endpoint("a"), endpoint("b")
    mine, theirs = (region(torch.empty(nbytes, dtype=torch.uint8), fill) for fill in (1, POISON))
    a.register(mine, Deadline.after(SECONDS))
    b.register(theirs, Deadline.after(SECONDS))
    connect(a, b)
    prepared = a.prepare(program(mine, theirs), Deadline.after(SECONDS))
    assert b._opened is not None
    (peer,) = b._opened.link.peers
    fcntl.flock(peer.gate._file, fcntl.LOCK_EX)
    work = a.post(prepared, 0, Tag(1, "a", 0, 0), b"", None)
    Deadline.after(SECONDS).wait(lambda: work.post.pause > 0, "a copy that is put off", list)  # type: ignore[attr-defined]
    assert not work.poll()
    assert set(theirs.memory.tolist()) == {POISON}
    fcntl.flock(peer.gate._file, fcntl.LOCK_UN)
    finish(work)
    assert set(theirs.memory.tolist()) == {1}


@pytest.mark.trap(64)
def test_another_process_of_the_same_number_is_not_taken_for_the_peer() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(child.pid)
    assert started is not None
    life = Life("b", child.pid, started)
    life.check()
    with pytest.raises(PeerLostError, match=r"lost b: process \d+ is another one now"):
        Life("b", child.pid, started - 1)
    child.communicate(b"\n", SECONDS)
    with pytest.raises(PeerLostError, match=r"lost b: its process \d+ has ended"):
        life.check()
    with pytest.raises(PeerLostError, match=r"lost b: .*its process has ended"):
        Life("b", child.pid, started)
    assert start_time(child.pid) is None


@pytest.mark.trap(30)
def test_memory_that_cuda_does_not_export_is_refused_by_name(endpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    a, bad = endpoint("a"), region(private())
    segments = [{"address": bad.address, "total_size": bad.nbytes, "is_expandable": True}]
    monkeypatch.setattr(CudaSegments, "around", lambda self, device: segments)
    with pytest.raises(ConfigError, match=r"'memory' .*does not let other processes map.*weft_cudamalloc\.pool"):
        a.register(bad, Deadline.after(SECONDS))


def test_copies_between_addresses() -> None:
    source, target = np.arange(100, dtype=np.uint8), np.full(100, POISON, np.uint8)
    local = np.array([(source.ctypes.data + at, 10) for at in (0, 50)], IOVEC)
    copy_memory(local, np.array([(target.ctypes.data + at, 10) for at in (80, 0)], IOVEC))
    expected = np.full(100, POISON, np.uint8)
    expected[80:90], expected[:10] = source[:10], source[50:60]
    assert np.array_equal(target, expected)


def test_errors_of_the_kernel_are_those_of_weft() -> None:
    assert isinstance(write_error(OSError(errno.ESRCH, "x"), "b", "doing it"), PeerLostError)
    plain = write_error(OSError(errno.EFAULT, "Bad address"), "b", "doing it")
    assert type(plain) is TransportError
    assert str(plain) == "doing it (peer b) failed: Bad address"
    allow_writers()


@pytest.mark.parametrize("options", [{"threads": 0}, {"chunk_bytes": 1}, {"allow_writers": "perhaps"}])
def test_wrong_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        factory(options)


def test_every_option_is_documented() -> None:
    assert undocumented(MappedOptions) == []
