"""The address that a transport listens on."""

import pytest

from weft.errors import ConfigError
from weft.hosts import check_reachable, choose_host


def test_the_address_comes_from_host_interface_or_nic() -> None:
    assert choose_host("net", "127.0.0.1", "", ("eth9",)) == "127.0.0.1"
    assert choose_host("net", "", "lo", ("eth9",)) == "127.0.0.1"
    assert choose_host("net", "", "", ("lo",)) == "127.0.0.1"
    with pytest.raises(ConfigError, match="transport 'net': interface 'no_such_nic'"):
        choose_host("net", "", "no_such_nic", ())
    with pytest.raises(ConfigError, match="not both"):
        choose_host("net", "127.0.0.1", "lo", ())


@pytest.mark.trap(49)
def test_loopback_is_refused_between_hosts_only() -> None:
    check_reachable("net", "one", "127.0.0.1", "one", "127.0.0.1")
    check_reachable("net", "one", "10.0.0.1", "two", "10.0.0.2")
    with pytest.raises(ConfigError, match=r"this member's address is 127.0.0.1"):
        check_reachable("net", "one", "127.0.0.1", "two", "10.0.0.2")
    with pytest.raises(ConfigError, match=r"the peer's address is 127.0.0.2"):
        check_reachable("net", "one", "10.0.0.1", "two", "127.0.0.2")
