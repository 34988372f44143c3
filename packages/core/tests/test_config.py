"""A configuration of a member: where values come from, what is refused, and what each refusal says to do."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import pytest

import weft
from weft.authentication import Secret
from weft.builder import LayoutBuilder
from weft.config import SECTIONS, Settings
from weft.endpoint import Factory
from weft.local import LocalHub
from weft.options import Given, fields, one_of, parse, read
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.options import undocumented


class BirdOptions(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="bird"):
    """Options of a transport that nobody here knows."""

    flock: Annotated[int, msgspec.Meta(ge=1, le=9, extra={"unit": "birds"})] = 2
    """How many
    fly."""
    route: Annotated[str, one_of("coast", "river")] = "coast"
    ports: tuple[str, ...] = ()
    winds: dict[str, float] = {}
    rest_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None

    renamed: ClassVar = {"swarm": "flock"}
    removed: ClassVar = {"feather": "birds bring their own: leave it out"}


class BeastOptions(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="wild-beast"):
    """Options of another one."""

    legs: int = 4


def made(options: Any) -> Any:
    """The options, in place of a transport."""
    return options


bird, beast = (Factory(made, transport_api=1, options=kind) for kind in (BirdOptions, BeastOptions))


@pytest.fixture(autouse=True)
def animals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are installed, as any third party's transport would be, and one more that does not import."""
    info = tmp_path / "site" / "animals-7.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: animals\nVersion: 7.0\n")
    points = "bird = animals:bird\nwild-beast = animals:beast\nabsent = animals_absent:factory\n"
    (info / "entry_points.txt").write_text(f"[weft.transports]\n{points}")
    (info.parent / "animals.py").write_text("")
    monkeypatch.syspath_prepend(str(info.parent))
    animals = __import__("animals")
    monkeypatch.setattr(animals, "bird", bird, raising=False)
    monkeypatch.setattr(animals, "beast", beast, raising=False)


def refusal(*arguments: Any, environment: dict[str, str] | None = None, **named: Any) -> list[str]:
    """The faults that a configuration is refused with."""
    with pytest.raises(weft.ConfigError) as error:
        weft.load_config(*arguments, environment=environment or {}, **named)
    first, *faults = str(error.value).split("\n  ")
    assert first == "the configuration is wrong:"
    return faults


def test_python_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weft.toml"
    file.write_text(
        'job = "file"\nstore = "file"\nname = "file"\n[transport]\nname = "bird"\nflock = 3\nroute = "river"\n'
        "[policy]\ndigests = false\nstaging_bytes = 70_000\n[deadlines]\nmove = 1\nvote = 1\ncommit = 1\n"
    )
    environment = {
        "WEFT_CONFIG": str(file), "WEFT_STORE": "environment", "WEFT_NAME": "environment", "WEFT_BIRD_FLOCK": "4",
        "WEFT_BIRD_PORTS": "a, b:1", "WEFT_BIRD_WINDS": '{"north": 2}', "WEFT_DEADLINES_VOTE": "2.5",
        "WEFT_DEADLINES_COMMIT": "2", "WEFT_EXPECT_SOURCES": "8", "WEFT_EXPECT_REPLICAS": "2", "HOME": "/root",
    }  # fmt: skip
    values = {"name": "python", "deadlines": {"commit": 3}, "policy": {"staging_bytes": 80_000}}
    config = weft.load_config(values, environment=environment)
    assert (config.settings.job, config.settings.store, config.settings.name) == ("file", "environment", "python")
    assert config.transport_options == {"flock": 4, "route": "river", "ports": ("a", "b:1"), "winds": {"north": 2.0}}
    assert config.policy == weft.Policy(digests=False, staging_bytes=80_000)
    assert config.deadlines == weft.Deadlines(move=1, vote=2.5, commit=3)
    assert config.expect == weft.Expect(sources=8, replicas=2)
    origins = {value.key: value.origin for value in config.values}
    assert origins["job"] == origins["transport.route"] == str(file)
    assert origins["transport.flock"] == "WEFT_BIRD_FLOCK"
    assert origins["name"] == origins["deadlines.commit"] == "Python"
    assert origins["deadlines.offer"] == origins["transport.rest_seconds"] == "default"
    assert weft.load_config(values, file=file, environment={}).settings.store == "file"
    assert weft.load_config(environment={}).settings == Settings()


def test_structs_are_sections_and_a_transport_is_known_by_the_type_of_its_options() -> None:
    values = {
        "transport": BirdOptions(flock=7),
        "policy": weft.Policy(relay="host"),
        "deadlines": weft.Deadlines(offer=9.0),
        "expect": weft.Expect(1, 2),
    }
    config = weft.load_config(values, environment={})
    assert config.settings.transport == "bird"
    assert bird(config.transport_options) == BirdOptions(flock=7)
    assert (config.policy, config.deadlines) == (values["policy"], values["deadlines"])
    assert config.expect == values["expect"]


@pytest.mark.trap(60)
def test_every_fault_of_every_origin_is_told_at_once_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "weft.toml"
    file.write_text('[transport]\nname = "bird"\nflok = 3\nlegs = 4\nswarm = 1\nfeather = 0\nroute = "sky"\n')
    environment = {
        "WEFT_BIRD_FLOCK": "10", "WEFT_POLICY_CASTS": "{", "WEFT_WILD_BEAST_LEGS": "3", "WEFT_TRANSPOT": "bird",
        "WEFT_EXPECT_SOURCES": "1",
    }  # fmt: skip
    values = {"jobs": 1, "polcy": {}, "transport_options": {}, "policy": {"vote": 1, "max_segments": 0}, "deadlines": 3}
    assert sorted(refusal(values, file=file, environment=environment)) == sorted(
        [
            f"{file}: transport 'bird' has no option flok; did you mean 'flock'?",
            f"{file}: transport 'bird' has no option legs; transport 'wild-beast' has it",
            f"{file}: transport 'bird' has no option swarm; it is called 'flock' now",
            f"{file}: transport 'bird' has no option feather; it was removed: birds bring their own: leave it out",
            f"{file}: route of transport 'bird' 'sky' is none of coast, river",
            "WEFT_BIRD_FLOCK: flock of transport 'bird' is '10': Expected `int` <= 9",
            "WEFT_POLICY_CASTS: casts of policy is '{': Expected `array`, got `str`",
            "WEFT_WILD_BEAST_LEGS: it is for transport 'wild-beast', but the transport is 'bird': unset it, or set "
            "WEFT_TRANSPORT=wild-beast",
            "WEFT_TRANSPOT: there is no such variable; did you mean WEFT_TRANSPORT?",
            "expect needs the option replicas",
            "Python: the configuration has no option jobs; did you mean 'job'?",
            "Python: there is no section 'polcy'; did you mean policy?",
            "Python: the configuration has no option transport_options; it was removed: options stand beside the "
            'name of their transport: {"name": …, option: value}',
            "Python: policy has no option vote; deadlines has it",
            "Python: max_segments of policy is 0: Expected `int` >= 1",
            "Python: deadlines is 3, expected a table of its fields",
        ]
    )


def test_options_of_a_transport_that_another_origin_overrides_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weft.toml"
    file.write_text('transport = {name = "bird", flock = 3}\n')
    assert refusal(file=file, environment={"WEFT_TRANSPORT": "wild-beast"}) == [
        f"{file}: option flock is for transport 'bird', but WEFT_TRANSPORT chooses 'wild-beast': leave it out, or "
        "choose 'bird'"
    ]
    assert refusal({"transport": {"flock": 1}}) == ["Python: option flock of no transport: choose one by name"]
    assert "no transport 'birt' is installed: did you mean 'bird'?" in refusal({"transport": "birt"})[0]
    assert "does not import" in refusal({"transport": "absent"})[0]


def test_a_policy_that_contradicts_itself_is_a_fault_beside_others() -> None:
    found = refusal({"policy": {"casts": [["float32", "bf16"]], "relay": "rack"}})
    assert found[0] == "Python: relay of policy 'rack' is none of never, host, domain, auto"
    assert found[1].startswith("policy: cast float32 to bf16")


@pytest.mark.parametrize("text", [None, "job = ", b"\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | bytes | None) -> None:
    file = tmp_path / "weft.toml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(weft.ConfigError, match=r"configuration .*weft\.toml cannot be read"):
        weft.load_config(file=file, environment={})


def test_variables_of_others_that_begin_like_ours_are_let_be_and_listed() -> None:
    service = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_STORE", "PORT", "PORT_29511_TCP", "PORT_29511_TCP_PORT")
    environment = {f"{prefix}_{name}": "1" for prefix in ("WEFT", "WEFT_STORE") for name in service}
    assert weft.load_config(environment=environment).unread == tuple(sorted(environment))


def test_what_is_missing_for_a_refit_is_listed() -> None:
    with pytest.raises(weft.ConfigError, match=r"lacks store \(WEFT_STORE\), name \(WEFT_NAME\), expect \(WEFT"):
        weft.load_config({"transport": "bird", "job": "j"}, environment={}).arguments()


@pytest.mark.trap(60)
def test_options_given_to_a_transport_itself_are_checked_the_same_way() -> None:
    with pytest.raises(weft.ConfigError) as error:
        bird({"legs": 2, "swarm": 3, "flock": 0, "route": "sky"})
    assert str(error.value).split("; ")[::2] == [
        "options: transport 'bird' has no option legs",
        "options: transport 'bird' has no option swarm",
        "options: flock of transport 'bird' is 0: Expected `int` >= 1",
    ]
    assert bird({"flock": 3}) == BirdOptions(flock=3)


def test_an_option_without_a_default_must_be_given() -> None:
    class Strict(msgspec.Struct):
        here: int

    with pytest.raises(weft.ConfigError, match="it needs the option here"):
        parse(Strict, {}, "it")


def test_fields_are_described_in_words() -> None:
    flock, route, ports, winds, rest = fields(BirdOptions)
    assert (flock.type, flock.unit, flock.range, flock.default) == ("whole number", "birds", "at least 1, at most 9", 2)
    assert flock.doc == "How many fly."
    assert (route.type, route.range, route.doc) == ("text", "coast, river", "")
    assert (ports.type, winds.type) == ("list of text", "table of number")
    assert (rest.type, rest.unit, rest.range, rest.default) == ("number", "seconds", "more than 0", None)


def test_text_of_a_variable_is_read_as_what_the_field_holds() -> None:
    texts = {"digests": "false", "only": "a.*,b", "casts": '[["float32","bfloat16"]]', "bucket_bytes": "4096"}
    given = {name: Given(text, "E", text=True) for name, text in texts.items()}
    assert read(weft.Policy, given, "policy") == (
        {"digests": False, "only": ("a.*", "b"), "casts": (("float32", "bfloat16"),), "bucket_bytes": 4096}, [],
    )  # fmt: skip
    assert read(weft.Policy, {"bucket_bytes": Given("4096", "file")}, "policy")[1] == [
        "file: bucket_bytes of policy is '4096': Expected `int`, got `str`"
    ]


@pytest.mark.parametrize("kind", SECTIONS.values())
def test_every_field_is_documented_and_every_number_has_a_unit_and_a_range(kind: type) -> None:
    assert undocumented(kind) == []


def test_what_is_not_documented_is_found() -> None:
    class Bare(msgspec.Struct):
        count: int = 0
        """Something."""
        some_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
        thing: object = None
        """Something."""

    assert undocumented(Bare) == [
        "Bare.count lacks a unit, a range",
        "Bare.some_bytes lacks documentation",
        "Bare.thing lacks a type of text, numbers, lists or tables",
    ]


def test_a_refit_runs_from_a_configuration(tmp_path: Path) -> None:
    builder = LayoutBuilder()
    builder.tensor("w", (64,), "bfloat16")
    builder.buffer("w", "bfloat16", 64, group="g")
    builder.shard("w", "w")
    layout = builder.build()
    source, target = MemorySource("trainer/0", layout), MemoryTarget("rollout/0", layout)
    for tensor in source.memory().values():
        tensor.fill_(7)
    for tensor in target.memory().values():
        tensor.fill_(-1)
    file = tmp_path / "weft.toml"
    file.write_text(f'job = "j"\nstore = "file://{tmp_path}/store"\n[expect]\nsources = 1\nreplicas = 1\n')
    hub = LocalHub()

    def member(**own: Any) -> None:
        values = {"transport": {"name": "local", "hub": hub}, "name": own.pop("name"), "replica": own.pop("replica")}
        config = weft.load_config(values, file=file, environment={})
        with weft.Refit(**own, **config.arguments()) as refit:
            refit.run(1)

    thread = threading.Thread(target=member, kwargs={"source": source, "name": "trainer/0", "replica": None})
    thread.start()
    member(target=target, name="rollout/0", replica="rollout")
    thread.join(60)
    assert not thread.is_alive()
    assert all((tensor == 7).all() for tensor in target.memory().values())


WORDS = "correct horse battery staple"


def test_a_secret_comes_from_python_a_variable_or_a_file_of_its_own_and_is_shown_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(WORDS + "\n")
    more = {"transport": "bird", "store": "s", "job": "j", "name": "n", "expect": weft.Expect(1, 1)}
    for values, environment, origin in (
        ({"secret": WORDS}, {}, "Python"),
        ({"secret": Secret(WORDS)}, {}, "Python"),
        ({"secret": WORDS.encode()}, {}, "Python"),
        ({}, {"WEFT_SECRET": WORDS}, "WEFT_SECRET"),
        ({}, {"WEFT_SECRET_FILE": str(file)}, "default"),
        ({"secret_file": str(file)}, {}, "default"),
    ):
        config = weft.load_config({**more, **values}, environment=environment)
        assert config.settings.secret == Secret(WORDS)
        assert config.arguments()["secret"] == Secret(WORDS)
        assert "secret_file" not in config.arguments()
        assert {value.key: value.origin for value in config.values}["secret"] == origin
        assert "horse" not in repr(config) + repr(config.arguments()) + "".join(str(one.value) for one in config.values)
    assert weft.load_config(more, environment={}).arguments()["secret"] is None


def test_the_password_in_a_stores_url_is_used_and_not_listed() -> None:
    url = "redis://member:n0t%2Ffor%40you@10.0.0.1:6379/0"
    config = weft.load_config({"store": url}, environment={})
    assert config.settings.store == url
    assert "Settings(transport=None, store='redis://…@10.0.0.1:6379/0', job=None, " in repr(config)
    assert "n0t" not in repr(config)
    assert [one.value for one in config.values if one.key == "store"] == ["redis://…@10.0.0.1:6379/0"]


def test_a_secret_in_the_configuration_file_is_refused_without_being_shown(tmp_path: Path) -> None:
    file = tmp_path / "weft.toml"
    file.write_text(f'secret = "{WORDS}"\n')
    (fault,) = refusal(file=file)
    assert fault == (
        f"{file}: a secret does not belong here: give secret_file, the path of a file that holds it, or the variable "
        "WEFT_SECRET"
    )


@pytest.mark.parametrize("value", ["battery horse", b"battery horse", 12345, ["battery horse staple"], 3.5])
def test_a_secret_that_is_none_is_not_shown_either(value: Any) -> None:
    (fault,) = refusal({"secret": value})
    assert fault.startswith("Python: secret of the configuration is …: the job secret ")
    assert "horse" not in fault
    assert "12345" not in fault


def test_faults_of_secrets_are_told_with_the_others(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("short")
    faults = refusal({"secret": WORDS, "secret_file": str(file), "transport": "absent"})
    assert "secret and secret_file are both given: leave one out" in faults
    assert any(fault.startswith("the job secret has 5 bytes") for fault in refusal({"secret_file": str(file)}))
    assert any("nowhere cannot be read" in fault for fault in refusal({"secret_file": str(tmp_path / "nowhere")}))
    (fault,) = refusal(environment={"WEFT_SECRTE": WORDS})
    assert fault == "WEFT_SECRTE: there is no such variable; did you mean WEFT_SECRET?"
