"""Two hosts on one machine: network namespaces, the links between them, and processes that run in them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from support.delay import Delay, delayed, tap

SECONDS = 60
RAILS = ("rail0", "rail1")
"""The links: `rail0` for the weights, and `rail1`, which is never cut, for the store."""
FAR = "far"
"""A link that `Hosts.far` makes, with a delay."""


def ip(*arguments: str) -> None:
    """Run `ip`; an error of it is an error."""
    _run("ip", *arguments)


def address(host: int, rail: str) -> str:
    """The IPv4 address of the first (0) or second (1) host on a link."""
    return f"10.77.{(*RAILS, FAR).index(rail)}.{host + 1}"


class Hosts:
    """Two network namespaces with nothing but loopback and two links between them."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.names = names
        self._programs = [folder / f"python-on-{host}" for host in range(len(names))]
        # Once for all: a shell that has just been started may still have to read what it runs.
        for name, program in zip(names, self._programs, strict=True):
            program.write_text(f'#!/bin/sh\nexec ip netns exec {name} {sys.executable} "$@"\n')
            program.chmod(0o755)

    def shape(self, rail: str, rate: str, burst: str, queue: str) -> None:
        """Limit what either end sends on a link; what waits longer than `queue` is dropped. In the words of `tc`."""
        for name in self.names:
            words = ("rate", rate, "burst", burst, "latency", queue)
            _run("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", rail, "root", "tbf", *words)

    def cut(self, rail: str) -> None:
        """Take a link down at the first host: the second sends into it without hearing that nothing arrives."""
        ip("-n", self.names[0], "link", "set", rail, "down")

    def restore(self, rail: str) -> None:
        """Take it up again."""
        ip("-n", self.names[0], "link", "set", rail, "up")

    def sent(self, host: int, rail: str) -> int:
        """Bytes that have left a host over a link."""
        file = f"/sys/class/net/{rail}/statistics/tx_bytes"
        return int(_run("ip", "netns", "exec", self.names[host], "cat", file))

    @contextlib.contextmanager
    def far(self, seconds: float) -> Iterator[Delay]:
        """A further link, `FAR`, on which everything takes so long, either way."""
        devices = [tap() for _ in self.names]
        with delayed(seconds, (devices[0][1], devices[1][1])) as delay:
            for host, (name, _) in enumerate(devices):
                ip("link", "set", name, "netns", self.names[host], "name", FAR)
                ip("-n", self.names[host], "address", "add", f"{address(host, FAR)}/24", "dev", FAR)
                ip("-n", self.names[host], "link", "set", FAR, "mtu", "9000", "up")
            yield delay

    @contextlib.contextmanager
    def starting_on(self, host: int) -> Iterator[None]:
        """What `multiprocessing` spawns meanwhile runs on a host."""
        resource_tracker.ensure_running()  # it would be spawned there as well
        multiprocessing.set_executable(str(self._programs[host]))
        try:
            yield
        finally:
            multiprocessing.set_executable(sys.executable)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make them and take them away. Skips the test, with the reason, where they cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"weft-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    try:
        try:
            ip("netns", "add", names[0])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        ip("netns", "add", names[1])
        for rail in RAILS:
            end = ("name", rail, "netns")
            ip("link", "add", *end, names[0], "type", "veth", "peer", *end, names[1])
            for host, name in enumerate(names):
                ip("-n", name, "address", "add", f"{address(host, rail)}/24", "dev", rail)
                ip("-n", name, "link", "set", rail, "up")
        for name in names:
            ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(names, folder)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=SECONDS)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout
