"""Options of the `gloo` transport, and the address it listens on."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from typing import Annotated

import msgspec

from weft.errors import ConfigError

_Bytes = Annotated[int, msgspec.Meta(ge=1)]

_GET_INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR of Linux's netdevice(7)
_UNROUTED = ("192.0.2.1", 9)  # TEST-NET-1: choosing a route to it sends nothing


class GlooOptions(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="gloo"):
    """What `transport_options` may hold. The three sizes must be equal at all members."""

    host: str = ""
    """IP address or name to listen on, and that peers reach."""
    interface: str = ""
    """Or the network interface whose IPv4 address that is; by default the member's first NIC."""
    pack_below_bytes: _Bytes = 256 << 10
    """Segments shorter than this travel together in one message."""
    pack_bytes: _Bytes = 1 << 20
    """Size of such a message, and of each staging buffer."""
    depth: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "messages"})] = 4
    """Most messages in flight per peer and direction, and number of its staging buffers."""


def choose_host(options: GlooOptions, nics: tuple[str, ...]) -> str:
    """IPv4 address to listen on: the options', the first NIC's, else the one that leads out of this host.

    Raises `ConfigError` when both options are given, or when the host or interface does not exist.
    """
    if options.host and options.interface:
        raise ConfigError(f"transport 'gloo': give host={options.host!r} or interface={options.interface!r}, not both")
    if options.host:
        try:
            return socket.gethostbyname(options.host)
        except OSError as error:
            raise ConfigError(f"transport 'gloo': host {options.host!r} cannot be resolved: {error}") from error
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        interface = options.interface or (nics[0] if nics else "")
        if interface:
            try:
                reply = fcntl.ioctl(probe, _GET_INTERFACE_ADDRESS, struct.pack("256s", interface.encode()[:15]))
            except OSError as error:
                raise ConfigError(f"transport 'gloo': interface {interface!r} has no IPv4 address: {error}") from error
            return socket.inet_ntoa(reply[20:24])
        try:
            probe.connect(_UNROUTED)
            return str(probe.getsockname()[0])
        except OSError:  # no way out of this host: then no peer is elsewhere, which `connect` checks
            return "127.0.0.1"


def check_reachable(own_host: str, own: str, peer_host: str, peer: str) -> None:
    """Refuse a loopback address between different hosts (trap 49)."""
    for whose, address in (("this member's", own), ("the peer's", peer)):
        if own_host != peer_host and ipaddress.ip_address(address).is_loopback:
            raise ConfigError(
                f"transport 'gloo' between hosts {own_host!r} and {peer_host!r}: {whose} address is {address}, which "
                "only its own host reaches; give that member the option host or interface"
            )
