"""Which address of this host a transport listens on, and whether a peer can reach it."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Sequence

from weft.errors import ConfigError

_GET_INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR of Linux's netdevice(7)
_UNROUTED = ("192.0.2.1", 9)  # TEST-NET-1: choosing a route to it sends nothing


def choose_host(transport: str, host: str, interface: str, nics: Sequence[str]) -> str:
    """IPv4 address to listen on: the options `host` or `interface`, the first NIC's, else the one that leads out.

    Raises `ConfigError` when both options are given, or when the host or interface does not exist.
    """
    if host and interface:
        raise ConfigError(f"transport '{transport}': give host={host!r} or interface={interface!r}, not both")
    if host:
        try:
            return socket.gethostbyname(host)
        except OSError as error:
            raise ConfigError(f"transport '{transport}': host {host!r} cannot be resolved: {error}") from error
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        name = interface or (nics[0] if nics else "")
        if name:
            try:
                reply = fcntl.ioctl(probe, _GET_INTERFACE_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError as error:
                raise ConfigError(
                    f"transport '{transport}': interface {name!r} has no IPv4 address: {error}"
                ) from error
            return socket.inet_ntoa(reply[20:24])
        try:
            probe.connect(_UNROUTED)
            return str(probe.getsockname()[0])
        except OSError:  # no way out of this host: then no peer is elsewhere, which `check_reachable` checks
            return "127.0.0.1"


def check_reachable(transport: str, own_host: str, own: str, peer_host: str, peer: str) -> None:
    """Refuse a loopback address between different hosts (trap 49)."""
    for whose, address in (("this member's", own), ("the peer's", peer)):
        if own_host != peer_host and ipaddress.ip_address(address).is_loopback:
            raise ConfigError(
                f"transport '{transport}' between hosts {own_host!r} and {peer_host!r}: {whose} address is {address}, "
                "which only its own host reaches; give that member the option host or interface"
            )
