"""Plug-ins are found, refused and loaded by what installed distributions say, read from real metadata on `sys.path`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weft.contracts import TRANSPORT_API, TransportFactory
from weft.errors import PluginError
from weft.plugins import discover, load

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes a distribution with one module per entry point: `install("weft-good", "good", "def factory(): ...")`."""
    before = set(sys.modules)

    def write(
        distribution: str, name: str, source: str, *, group: str = "weft.transports", version: str = "1.2.3"
    ) -> None:
        place = tmp_path / distribution
        module = f"plugin_{distribution.replace('-', '_')}"
        metadata = place / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir(parents=True)
        (place / f"{module}.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:factory\n")
        monkeypatch.syspath_prepend(place)

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("plugin_"):
            del sys.modules[name]


GOOD = "def factory():\n    return 'a transport'\n\nfactory.transport_api = 1\n"


def test_an_installed_plugin_is_listed_and_loaded(install: Install) -> None:
    install("weft-good", "good", GOOD)
    (info,) = [info for info in discover("weft.transports") if info.name == "good"]
    assert (info.distribution, info.version, info.value) == ("weft-good", "1.2.3", "plugin_weft_good:factory")
    assert (info.state, info.reason) == ("ok", "")
    assert load("weft.transports", "good")() == "a transport"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_library_that_is_not_there", "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"),
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("x = (", "SyntaxError"),
        ("other = 1", "AttributeError"),
    ],
)
def test_a_plugin_that_does_not_import_is_listed_with_its_reason_and_harms_nobody(
    install: Install, source: str, reason: str
) -> None:
    install("weft-broken", "broken", source)
    install("weft-good", "good", GOOD)
    infos = {info.name: info for info in discover("weft.transports")}
    assert infos["broken"].state == "broken"
    assert reason in infos["broken"].reason
    assert infos["good"].state == "ok"
    with pytest.raises(PluginError, match=r"transport 'broken' of weft-broken 1\.2\.3 does not import") as caught:
        load("weft.transports", "broken")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("factory.transport_api = 2", r"written for transport API 2, this weft-core has 1: .* --upgrade weft-core$"),
        ("factory.transport_api = 0", r"written for transport API 0, this weft-core has 1: .* --upgrade acme-net$"),
        ("", r"does not say which transport API .* has 1: make plugin_acme_net:factory a weft\.endpoint\.Factory"),
    ],
)
def test_a_transport_for_another_api_is_refused_with_both_numbers(install: Install, said: str, reason: str) -> None:
    install("acme-net", "acme", f"def factory(options): ...\n{said}\n")
    with pytest.raises(PluginError, match=rf"transport 'acme' of acme-net 1\.2\.3 .*{reason}"):
        load("weft.transports", "acme")
    (info,) = [info for info in discover("weft.transports") if info.name == "acme"]
    assert info.state == "broken"
    assert re.search(reason, info.reason)


@pytest.mark.parametrize("name", ["local", "gloo", "mapped", "nccl", "nixl", "nvshmem"])
def test_every_shipped_transport_was_written_for_this_api(name: str) -> None:
    if name in {info.name for info in discover("weft.transports")}:
        factory: TransportFactory = load("weft.transports", name)
        assert factory.transport_api == TRANSPORT_API


def test_loading_one_plugin_imports_no_other(install: Install) -> None:
    install("weft-good", "good", GOOD)
    install("weft-other", "other", GOOD)
    load("weft.transports", "good")
    assert "plugin_weft_good" in sys.modules
    assert "plugin_weft_other" not in sys.modules


def test_a_plugin_that_is_not_installed_says_what_to_install_and_what_is_there(install: Install) -> None:
    install("weft-good", "good", GOOD, group="weft.allocators")
    with pytest.raises(PluginError, match=r"no allocator 'pinned' is installed: pip install weft-pinned .*good"):
        load("weft.allocators", "pinned")


def test_a_misspelt_name_is_answered_with_the_likely_one(install: Install) -> None:
    install("weft-nixie", "nixie", GOOD)
    with pytest.raises(PluginError, match="did you mean 'nixie'"):
        load("weft.transports", "nixi")


def test_two_distributions_that_claim_one_name_are_an_error_that_names_both(install: Install) -> None:
    install("weft-good", "good", GOOD)
    install("acme-good", "good", GOOD, version="7")
    install("weft-fine", "fine", GOOD)
    with pytest.raises(PluginError, match=r"'good' is claimed by acme-good 7 .* and weft-good 1\.2\.3 "):
        load("weft.transports", "good")
    infos = [info for info in discover("weft.transports") if info.name == "good"]
    assert [(info.distribution, info.state) for info in infos] == [("acme-good", "broken"), ("weft-good", "broken")]
    assert all("acme-good 7" in info.reason and "weft-good 1.2.3" in info.reason for info in infos)
    assert load("weft.transports", "fine")() == "a transport"


def test_one_distribution_seen_twice_on_the_path_counts_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("weft-good", "good", GOOD)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "weft-good"), *sys.path, str(tmp_path / "weft-good")])
    assert load("weft.transports", "good")() == "a transport"


def test_a_plugin_installed_later_is_found_at_once(install: Install) -> None:
    with pytest.raises(PluginError):
        load("weft.transports", "good")
    install("weft-good", "good", GOOD)
    assert load("weft.transports", "good")() == "a transport"


def test_cores_own_plugins_come_through_the_same_groups() -> None:
    assert {info.name: info.distribution for info in discover("weft.stores") if info.name in ("tcp", "file")} == {
        "tcp": "weft-core",
        "file": "weft-core",
    }
