"""Options, environment and NIXL's own errors, without a network."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from weft.deadline import Deadline
from weft.errors import ConfigError, PeerLostError, TransportError
from weft.member import Member, Region
from weft.testing.options import undocumented
from weft_nixl import NixlOptions, factory
from weft_nixl.library import FOREIGN, candidates, find, translate, translated
from weft_nixl.options import backend_parameters


def test_parameters_are_what_nixl_reads() -> None:
    options = NixlOptions(
        num_threads=2, backends=("UCX", "POSIX"), backend_parameters={"POSIX": {"use_aio": "true"}, "UCX": {"x": "y"}}
    )
    assert backend_parameters(options) == {
        "UCX": {"ucx_error_handling_mode": "peer", "num_threads": "2", "x": "y"},
        "POSIX": {"use_aio": "true"},
    }
    with pytest.raises(ConfigError, match="backend_parameters has LIBFABRIC, but backends are UCX"):
        backend_parameters(NixlOptions(backend_parameters={"LIBFABRIC": {}}))


@pytest.mark.parametrize(
    "options",
    [{"depth": 0}, {"depth": "many"}, {"ucx_error_handling_mode": "maybe"}, {"probe_seconds": 0}, {"rails": 0}],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        factory(options)


@pytest.mark.trap(60)
def test_unknown_and_renamed_options_say_what_to_write() -> None:
    with pytest.raises(ConfigError) as error:
        factory({"depht": 3, "device_list": ["mlx5_0:1"], "engine_config": {"TLS": "rc"}})
    for words in ("depht; did you mean 'depth'", "device_list; it is called 'nics' now", "'ucx_settings' now"):
        assert words in str(error.value)


def test_every_option_is_documented() -> None:
    assert undocumented(NixlOptions) == []


def test_every_error_of_nixl_becomes_one_of_weft() -> None:
    assert len(FOREIGN) >= 11
    for kind in FOREIGN:
        expected = rf"doing it \(peer b\).*{kind.__name__}|lost b: doing it"
        with pytest.raises(TransportError, match=expected) as caught, translated("doing it", "b"):
            raise kind("NIXL_ERR")
        lost = kind.__name__ == "nixlRemoteDisconnectError"
        assert isinstance(caught.value, PeerLostError) == lost
    with pytest.raises(ZeroDivisionError), translated("doing it"):
        raise ZeroDivisionError


def test_an_error_of_a_later_nixl_is_still_a_transport_error() -> None:
    error = translate(RuntimeError("new"), "doing it", "")
    assert type(error) is TransportError
    assert "RuntimeError: new" in str(error)


def test_a_missing_nixl_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"weft-nixl\[cu12\].*no_such_wheel"):
        find(["no_such_wheel"])
    assert candidates("13.0")[1] == "nixl_cu13"
    assert candidates(None)[1] == "nixl_cu12"


def test_importing_without_nixl_says_what_to_install() -> None:
    program = (
        "import sys\nfor name in ('nixl', 'nixl_cu12', 'nixl_cu13'):\n    sys.modules[name] = None\nimport weft_nixl\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "pip install 'weft-nixl[cu12]'" in result.stderr.splitlines()[-1]


def test_a_backend_that_nixl_does_not_have_is_named() -> None:
    transport = factory({"backends": ["CARRIER_PIGEON"]})
    with pytest.raises(TransportError, match=r"CARRIER_PIGEON.*UCX"):
        transport.open(Member("a", None, None, None, 0, "here", "here", "cpu"))


def test_other_backends_are_created_with_their_parameters() -> None:
    parameters = {"ios_pool_size": "1024"}
    transport = factory({"backends": ["UCX", "POSIX"], "backend_parameters": {"POSIX": parameters}})
    transport.open(Member("a", None, None, None, 0, "here", "here", "cpu"))
    try:
        assert transport._agent.get_backend_params("POSIX")["ios_pool_size"] == "1024"
    finally:
        transport.close()


@pytest.mark.trap(29, 31)
def test_one_registration_per_region_and_everything_is_gone_before_the_agent() -> None:
    transport = factory({})
    transport.open(Member("a", None, None, None, 0, "here", "here", "cpu"))
    agent, calls = transport._agent, []
    for name in ("register_memory", "deregister_memory"):
        original = getattr(agent, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            assert transport._agent is agent
            return original(*arguments)

        setattr(agent, name, counted)
    for nbytes in (100, 1 << 20):
        transport.register(Region(f"r{nbytes}", torch.zeros(nbytes, dtype=torch.uint8)), Deadline.after(5))
    transport.address()
    transport.close()
    assert calls == ["register_memory"] * 2 + ["deregister_memory"] * 2
